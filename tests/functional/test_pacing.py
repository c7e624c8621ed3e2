"""Progress in steps under a share that moves, and blocks of replay."""

import numpy as np
import pytest

from retain.errors import ConfigError
from retain.functional.pacing import in_blocks, mean_share, progress
from retain.functional.sampling import schedule


@pytest.mark.parametrize("ratio", [1.0, 0.2, 4.0])
@pytest.mark.parametrize("fraction", [schedule("rising"), schedule("annealed", 0.3, part=0.4), lambda t: 0.8 * t * t])
def test_progress_is_the_inverse_of_the_new_rows_shown(fraction, ratio):
    def row_share(t):
        odds = ratio * fraction(t) / (1 - fraction(t))
        return odds / (1 + odds)

    total, shown, wanted = 0.0, [], (0.2, 0.5, 0.7, 1.0)
    for i in range(20_000):
        total += (1 - row_share((i + 0.5) / 20_000)) / 20_000
        if any(abs((i + 1) / 20_000 - t) < 1e-9 for t in wanted):
            shown.append(total)
    assert mean_share(fraction, ratio) == pytest.approx(1 - total, abs=3e-4)
    assert progress(fraction, np.array(shown) / total, ratio) == pytest.approx(wanted, abs=1e-3)
    assert progress(fraction, np.array([0.0, 1.0]), ratio).tolist() == [0.0, 1.0]


def test_a_constant_share_is_exact_and_its_progress_even():
    assert mean_share(lambda t: 0.1) == 0.1
    assert progress(lambda t: 0.7, np.linspace(0, 1, 11)) == pytest.approx(np.linspace(0, 1, 11))
    with pytest.raises(ConfigError, match="below 1"):
        mean_share(lambda t: 1.0)


def slow_blocks(replayed, period, spread):
    """Row by row: new rows and those that stay, then the block."""
    order, number = [], 0
    for begin in range(0, len(replayed), period):
        block = []
        for i in range(begin, min(begin + period, len(replayed))):
            if replayed[i]:
                number += 1
                if int(number * spread) == int((number - 1) * spread):
                    block.append(i)
                    continue
            order.append(i)
        order += block
    return order


@pytest.mark.parametrize("spread", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("period", [1, 8, 24, 1000])
def test_blocks_equal_a_slow_reference(period, spread):
    replayed = np.random.default_rng(0).random(203) < 0.3
    order = in_blocks(replayed, period, spread)
    assert order.tolist() == slow_blocks(replayed, period, spread)
    assert sorted(order) == list(range(203))
    for begin in range(0, 203, period):  # each period keeps its rows, and so its share
        assert set(order[begin : begin + period]) == set(range(begin, min(203, begin + period)))


def test_all_spread_is_no_block():
    replayed = np.arange(100) % 3 == 0
    assert in_blocks(replayed, 20, 1.0).tolist() == list(range(100))
