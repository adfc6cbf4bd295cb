"""Promises 8 and 9 in short form: bad rows and bad recipes are named."""

from __future__ import annotations

from tests.kit.trials import bad_recipes, bad_rows


def test_bad_rows_are_named_and_good_ones_kept(tmp_path):
    tally = bad_rows.run(tmp_path, count=110)
    assert tally.whole, tally.failures
    assert tally.figures["kinds"] >= 90


def test_bad_recipes_are_named_all_faults_at_once(tmp_path):
    tally = bad_recipes.run(tmp_path, count=80)
    assert tally.whole, tally.failures
    assert tally.figures["faults"] > tally.tried
