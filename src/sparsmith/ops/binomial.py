"""The exact one-sided bound on a proportion (Clopper and Pearson 1934), from the binomial tail alone."""

from __future__ import annotations

import math


def upper_tail(successes: int, trials: int, p: float) -> float:
    """P(X >= successes) for X ~ Binomial(trials, p)."""
    if successes <= 0:
        return 1.0
    if p <= 0.0:
        return 0.0
    if p >= 1.0:
        return 1.0
    return min(1.0, math.exp(_log_sum(_log_terms(successes, trials, p))))


def lower_bound(successes: int, trials: int, level: float = 0.95) -> float:
    """The p at which `successes` or more of `trials` would come with probability 1 - level: the true share is above it with that
    confidence. 0 without successes; level in (0, 1)."""
    assert 0 <= successes <= trials
    if successes == 0:
        return 0.0
    alpha, low, high = 1 - level, 0.0, successes / trials
    if successes == trials:
        return alpha ** (1 / trials)
    for _ in range(60):
        middle = (low + high) / 2
        if upper_tail(successes, trials, middle) > alpha:
            high = middle
        else:
            low = middle
    return low


def _log_terms(successes: int, trials: int, p: float) -> list[float]:
    """log C(n, k) p^k (1-p)^(n-k) for k = successes..n, until a term no longer counts (they fall beyond the mean)."""
    ratio, whole = math.log(p) - math.log1p(-p), trials * math.log1p(-p) + math.lgamma(trials + 1)
    terms: list[float] = []
    for k in range(successes, trials + 1):
        term = whole + k * ratio - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        terms.append(term)
        if k > trials * p and term < terms[0] - 60 and term < max(terms[-2:]):
            break
    return terms


def _log_sum(terms: list[float]) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))
