"""The bound on a proportion against exact sums."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from sparsmith.ops.binomial import lower_bound, upper_tail


def exact_tail(successes: int, trials: int, p: Fraction) -> float:
    return float(sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(successes, trials + 1)))


@pytest.mark.parametrize(
    ("successes", "trials"), [(1, 1), (3, 10), (10, 10), (49, 50), (195, 200), (1, 300), (150, 300)]
)
@pytest.mark.parametrize("p", [Fraction(1, 50), Fraction(1, 3), Fraction(49, 50)])
def test_the_tail_is_the_sum_of_its_terms(successes: int, trials: int, p: Fraction):
    assert upper_tail(successes, trials, float(p)) == pytest.approx(
        exact_tail(successes, trials, p), rel=1e-9, abs=1e-300
    )


@pytest.mark.parametrize(
    ("successes", "trials"), [(1, 1), (3, 10), (49, 50), (195, 200), (980, 1000), (99_000, 100_000)]
)
def test_at_the_bound_the_tail_is_one_in_twenty(successes: int, trials: int):
    bound = lower_bound(successes, trials, 0.95)
    assert 0 < bound < successes / trials
    assert upper_tail(successes, trials, bound) == pytest.approx(0.05, rel=1e-6)


def test_known_values():
    """All of n right: 0.05^(1/n); 149 of 149 is the first that proves 0.98. 9 of 10: the tables' 0.6058."""
    assert lower_bound(148, 148) < 0.98 <= lower_bound(149, 149)
    assert lower_bound(9, 10) == pytest.approx(0.6058, abs=5e-5)
    assert lower_bound(0, 10) == 0.0
    assert upper_tail(0, 5, 0.3) == 1.0 and upper_tail(2, 5, 0.0) == 0.0 and upper_tail(2, 5, 1.0) == 1.0
