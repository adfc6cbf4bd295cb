"""Promise 19: what earlier versions wrote opens today, and what later ones may write is refused in words."""

from __future__ import annotations

from tests.kit.trials import golden


def test_every_golden_folder_opens_with_its_logits(tmp_path):
    tally = golden.opens(tmp_path)
    assert tally.whole, tally.failures
    assert tally.tried >= 3


def test_a_version_of_the_future_is_refused_in_words(tmp_path):
    tally = golden.futures(tmp_path)
    assert tally.whole, tally.failures
