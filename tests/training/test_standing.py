"""What a budget knows from look to look."""

import pytest

from retain.config import BudgetConfig
from retain.functional import budget
from retain.training.standing import Standing, asked_at


def test_only_what_the_probes_measure_limits_the_drift():
    settings = BudgetConfig(lose_at_most=0.06, lose_at_most_nats=0.01)
    assert Standing().allowed(settings, (True, False)) == pytest.approx(0.06 / budget.PRIOR)
    assert Standing().allowed(settings, (False, True)) == pytest.approx(0.01)
    assert Standing().allowed(settings, (True, True)) == pytest.approx(0.01)


def test_probes_are_asked_at_looks_that_are_spread_and_not_at_the_end():
    assert asked_at(3, 10, 100) == {30, 50, 70}
    assert asked_at(1, 4, 24) == {12}
    assert asked_at(5, 10, 20) == {10}
    assert asked_at(3, 10, 10) == set()
