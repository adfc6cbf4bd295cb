from __future__ import annotations

import numpy as np
import pytest

from sparsmith.bootstrap import RowScores, paired_differences, summarise

DOMAINS = {"a": "maths", "b": "maths", "c": "code"}


def rows(n: int, seed: int, shift: float = 0.0) -> RowScores:
    rng = np.random.default_rng(seed)
    weight = rng.integers(1, 20, n)
    return RowScores(tuple((2 + shift + rng.normal(0, 0.3, n)) * weight), tuple(weight))


def shifted(rows: RowScores) -> RowScores:
    return RowScores(tuple(t - 0.05 * w for t, w in zip(rows.total, rows.weight)), rows.weight)


SCORES = {"a": {"loss": rows(50, 0)}, "b": {"loss": rows(30, 1)}, "c": {"loss": rows(40, 2, 1.0)}}


def test_values_are_token_weighted_and_the_whole_is_the_mean_of_domains():
    found = summarise(SCORES, DOMAINS, seed=1)
    a, b, c = (SCORES[name]["loss"] for name in "abc")
    maths = (sum(a.total) + sum(b.total)) / (sum(a.weight) + sum(b.weight))
    assert found.sets["a"]["loss"].value == pytest.approx(sum(a.total) / sum(a.weight))
    assert found.domains["maths"]["loss"].value == pytest.approx(maths)
    assert found.domains["maths"]["loss"].n == 80
    assert found.overall["loss"].value == pytest.approx((maths + sum(c.total) / sum(c.weight)) / 2)


def test_interval_agrees_with_the_normal_one_for_many_rows():
    """For 2,000 rows of equal weight the percentile interval is the normal interval of a mean."""
    x = np.random.default_rng(0).normal(1.0, 2.0, 2000)
    figure = summarise({"a": {"m": RowScores(tuple(x), (1.0,) * 2000)}}, {"a": "d"}, seed=3, resamples=4000).sets["a"][
        "m"
    ]
    half = 1.96 * x.std(ddof=1) / 2000**0.5
    assert figure.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert figure.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_interval_covers_the_truth_nineteen_times_of_twenty():
    hits = 0
    for trial in range(200):
        x = np.random.default_rng(trial).normal(0.0, 1.0, 60)
        scores = {"a": {"m": RowScores(tuple(x), (1.0,) * 60)}}
        figure = summarise(scores, {"a": "d"}, seed=trial, resamples=400).sets["a"]["m"]
        hits += figure.low <= 0.0 <= figure.high
    assert 178 <= hits <= 199  # 95 % of 200 is 190; a percentile interval of 60 rows is a little narrow


def test_the_seed_alone_decides_and_sets_do_not_disturb_each_other():
    assert summarise(SCORES, DOMAINS, seed=5) == summarise(SCORES, DOMAINS, seed=5)
    assert summarise(SCORES, DOMAINS, seed=5) != summarise(SCORES, DOMAINS, seed=6)
    alone = summarise({"c": SCORES["c"]}, DOMAINS, seed=5)
    assert alone.sets["c"] == summarise(SCORES, DOMAINS, seed=5).sets["c"]


def test_blocks_of_draws_do_not_change_the_draws(monkeypatch):
    whole = summarise(SCORES, DOMAINS, seed=5)
    monkeypatch.setattr("sparsmith.bootstrap._BLOCK", 700)
    assert summarise(SCORES, DOMAINS, seed=5) == whole


def test_a_paired_difference_is_surer_than_the_two_figures():
    """A shift of 0.05 on every row: the figures' intervals overlap, the difference's is almost a point."""
    better = {name: {"loss": shifted(metrics["loss"])} for name, metrics in SCORES.items()}
    gap = paired_differences(SCORES, better, DOMAINS, seed=1)
    for figure in (gap.sets["a"]["loss"], gap.domains["maths"]["loss"], gap.overall["loss"]):
        assert figure.value == pytest.approx(-0.05)
        assert (figure.low, figure.high) == pytest.approx((-0.05, -0.05))
    before, after = (
        summarise(SCORES, DOMAINS, seed=1).sets["a"]["loss"],
        summarise(better, DOMAINS, seed=1).sets["a"]["loss"],
    )
    assert after.high > before.low


def test_only_what_both_measured_is_compared():
    other = {"a": {"loss": rows(50, 9), "rank": rows(50, 9)}, "b": {"loss": rows(29, 1)}}
    gap = paired_differences(SCORES, other, DOMAINS, seed=1)
    assert {name: set(metrics) for name, metrics in gap.sets.items()} == {"a": {"loss"}}
    assert not paired_differences(SCORES, {}, DOMAINS, seed=1).sets


def test_one_row_has_an_interval_of_width_zero():
    figure = summarise({"a": {"m": RowScores((3.0,), (2.0,))}}, {"a": "d"}, seed=1).sets["a"]["m"]
    assert (figure.value, figure.low, figure.high, figure.n) == (1.5, 1.5, 1.5, 1)
