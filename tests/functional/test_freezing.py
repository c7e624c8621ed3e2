"""The recommended shares, corner by corner."""

import pytest

from retain.functional.freezing import SMALLEST, recommended_share


@pytest.mark.parametrize(
    ("parameters", "high", "middle", "low"),
    [
        (135e6, (0.5, 0.6), (0.6, 0.7), (0.7, 0.8)),
        (SMALLEST, (0.5, 0.6), (0.6, 0.7), (0.7, 0.8)),
        (7.6e9, (0.5, 0.6), (0.6, 0.7), (0.7, 0.8)),
        (8e9 + 1, (0.7, 0.8), (0.8, 0.9), (0.85, 0.95)),
        (30e9, (0.7, 0.8), (0.8, 0.9), (0.85, 0.95)),
        (30e9 + 1, (0.8, 0.9), (0.9, 0.95), (0.95, 0.99)),
        (1e12, (0.8, 0.9), (0.9, 0.95), (0.95, 0.99)),
    ],
)
def test_every_corner_of_the_table(parameters, high, middle, low):
    assert [recommended_share(parameters, s) for s in (1.0, 0.81)] == [high] * 2
    assert [recommended_share(parameters, s) for s in (0.8, 0.5)] == [middle] * 2
    assert [recommended_share(parameters, s) for s in (0.49, 0.0)] == [low] * 2


def test_larger_models_and_less_alike_data_freeze_more():
    sizes, likeness = (2e9, 20e9, 70e9), (0.9, 0.7, 0.2)
    table = [[sum(recommended_share(n, s)) for s in likeness] for n in sizes]
    for line in (*table, *zip(*table)):
        assert list(line) == sorted(line)
        assert len(set(line)) == 3
