"""Wins, losses, ties: the paper's printed scores, and both orders of a judge."""

from __future__ import annotations

import json

import pytest

from sparsmith.errors import DataError
from sparsmith.protocols.judging import Tally, Verdict, judge_both_orders, read_verdicts, score, tally

ITEMS = 170
# Sorted LLaMA (arXiv 2309.08968 v2), Tables 4 and 5: SoFT-n against the full SFT model: W, L, T, printed score
TWO_EPOCHS = {
    12: (17, 152.5, 0.5, -0.797),
    16: (18, 146, 6, -0.753),
    20: (32.5, 114, 23.5, -0.479),
    24: (44.5, 90, 35.5, -0.268),
    28: (45, 89, 36, -0.259),
    32: (55.5, 75, 39.5, -0.115),
    36: (53, 66, 51, -0.076),
    40: (52.5, 62.5, 55, -0.059),
}
FOUR_EPOCHS = {
    12: (23.5, 144, 2.5, -0.709),
    16: (34.5, 124.5, 11, -0.529),
    20: (47, 99.5, 23.5, -0.309),
    24: (53, 81, 36, -0.165),
    28: (50.5, 78, 41.5, -0.162),
    32: (63.5, 62, 44.5, 0.009),
    36: (62.5, 60, 47.5, 0.015),
    40: (67.5, 52, 50.5, 0.091),
}
CASES = [(f"{epochs}/{n}", *row) for epochs, table in ((2, TWO_EPOCHS), (4, FOUR_EPOCHS)) for n, row in table.items()]


@pytest.mark.parametrize(("wins", "losses", "ties", "printed"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_the_papers_scores(wins, losses, ties, printed):
    """The denominator is the number of items; the diagonal's full depth is the same comparison as the headline's."""
    found = Tally(wins, losses, ties)
    assert found.items == ITEMS
    assert found.score == pytest.approx(printed, abs=1e-3)
    assert score(wins, losses, ITEMS) == found.score


def by_length(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def always_first(prompt, first, second):
    return "first"


def test_both_orders():
    items = [("p", "aaa", "b"), ("p", "a", "bbb"), ("p", "a", "b"), ("p", "aa", "b")]
    found = tally(judge_both_orders(items, "soft@2", "sft@4", by_length), "soft@2", "sft@4")
    assert found == Tally(2, 1, 1)
    assert str(found) == "2/1/1 (+0.250)"
    # a judge who only likes a place tells nothing
    assert tally(judge_both_orders(items, "a", "b", always_first), "a", "b").score == 0
    assert tally([], "a", "b") is None


def test_seeds_are_items_of_their_own():
    one = judge_both_orders([("p", "aa", "b")], "a", "b", by_length, seed=0)
    two = judge_both_orders([("p", "aa", "b")], "a", "b", by_length, seed=1)
    assert tally([*one, *two], "a", "b") == Tally(2, 0, 0)


def test_one_order_alone_is_refused():
    with pytest.raises(DataError, match="item 7"):
        tally([Verdict("7", "a", "b", "first")], "a", "b")
    with pytest.raises(DataError, match="two verdicts"):
        tally([Verdict("7", "a", "b", "first"), Verdict("7", "a", "b", "tie")], "a", "b")


def test_a_file_of_verdicts(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    rows = [
        {"item": 1, "first": "soft@2", "second": "sft@4", "winner": "first"},
        {"item": 1, "first": "sft@4", "second": "soft@2", "winner": "tie"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert tally(read_verdicts(file), "soft@2", "sft@4") == Tally(0.5, 0, 0.5)
    for line in (
        "{",
        '{"item": 1}',
        json.dumps({**rows[0], "winner": "both"}),
        json.dumps({**rows[0], "second": "soft@2"}),
    ):
        file.write_text(json.dumps(rows[0]) + "\n" + line + "\n")
        with pytest.raises(DataError, match=r"verdicts\.jsonl:2"):
            read_verdicts(file)
    with pytest.raises(DataError, match="no readable file"):
        read_verdicts(tmp_path / "none.jsonl")
