"""What an expert may be called."""

import pytest

from retain.errors import ConfigError
from retain.experts.names import LONGEST, check_name


@pytest.mark.parametrize("name", ["medicine", "a", "law-2", "v1.5", "poems_zh", "成语", "géographie", "x" * LONGEST])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("a/b", "'/'"),
        ("a\\b", r"'\\\\'"),
        ("..", r"begins with '\.'"),
        (".", r"begins with '\.'"),
        (".hidden", r"begins with '\.'"),
        ("-o", "begins with '-'"),
        ("_x", "begins with '_'"),
        ("a b", "' '"),
        ("a\n", r"'\\n'"),
        ("a:b", "':'"),
        ("a=b", "'='"),
        ("a\0", "x00"),
        ("auto", "meaning"),
        ("Base", "meaning"),
        ("NONE", "meaning"),
        ("__base__", "meaning"),
        ("con", "device"),
        ("NUL.txt", "device"),
        ("lpt1", "device"),
        ("ends.", "drops"),
        ("x" * (LONGEST + 1), "65 characters"),
        ("e\u0301", "NFC"),
        ("a\u202eb", "202e"),
        ("x²", "²"),
    ],
)
def test_bad_names(name, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        check_name(name)
    assert "Allowed" in str(error.value)
