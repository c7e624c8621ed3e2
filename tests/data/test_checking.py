"""Checks of answers, by name and by a function of the user's."""

import sys

import pytest

from retain.data.checking import checker
from retain.data.matching import token_f1
from retain.errors import ConfigError

PAIRS = [("It is Paris.", "Paris"), ("paris", "Paris"), ("It is 72.", "7"), ("a b c d", "a b x y"), ("", "Paris")]


@pytest.mark.parametrize(
    ("name", "right"),
    [("exact", [False, True, False, False, False]), ("contains", [True, True, False, False, False])],
)
def test_by_name(name, right):
    check = checker(name, 0.5)
    assert [check(answer, stored, []) for answer, stored in PAIRS] == right


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_f1_over_a_threshold(threshold):
    check = checker("f1", threshold)
    found = [check(answer, stored, []) for answer, stored in PAIRS]
    assert found == [token_f1(answer, stored) >= threshold for answer, stored in PAIRS]
    assert any(found)
    assert not all(found)


def test_a_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_check.py").write_text(
        "def longer(answer, reference, prompt): return len(answer) > len(reference) and prompt[0]['role'] == 'user'\n"
        "def share(answer, reference, prompt): return len(answer) / 10\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    turns = [{"role": "user", "content": "?"}]
    assert checker("my_check:longer", 0.5)("abc", "a", turns)
    assert not checker("my_check:longer", 0.5)("a", "abc", turns)
    assert [checker("my_check:share", 0.5)("x" * n, "", turns) for n in (4, 5, 6)] == [False, True, True]
    for name, said in (("my_check:nothing", "cannot be loaded"), ("nowhere.at_all:x", "cannot be loaded")):
        with pytest.raises(ConfigError, match=said):
            checker(name, 0.5)
    with pytest.raises(ConfigError, match="is no function but int"):
        checker("my_check:number", 0.5)
    with pytest.raises(ConfigError, match="Did you mean 'exact'"):
        checker("exakt", 0.5)
    sys.modules.pop("my_check", None)


def test_a_function_in_the_working_folder_and_its_mistakes(tmp_path, monkeypatch):
    (tmp_path / "check_here.py").write_text(
        "def same(answer, reference, prompt): return answer == reference\n"
        "def wrong(answer, reference, prompt): return {}[answer,\n    'a']\n"
        "def nothing(answer, reference, prompt): pass\n"
    )
    (tmp_path / "check_broken.py").write_text("1 / 0\n")
    (tmp_path / "check_unread.py").write_text("def (\n")
    monkeypatch.chdir(tmp_path)
    assert checker("check_here:same", 0.5)("a", "a", [])
    for name, said in (("check_broken:x", "ZeroDivisionError"), ("check_unread:x", "SyntaxError")):
        with pytest.raises(ConfigError, match=said) as caught:
            checker(name, 0.5)
        assert "\n" not in str(caught.value)
    for name, said in (("check_here:wrong", "failed .KeyError"), ("check_here:nothing", "failed .TypeError")):
        with pytest.raises(ConfigError, match=said) as caught:
            checker(name, 0.5)("b", "a", [])
        assert "\n" not in str(caught.value)
    assert str(tmp_path) not in sys.path
    sys.modules.pop("check_here")
