"""Normalised scores, by hand."""

from __future__ import annotations

import math

import pytest

from sparsmith.errors import UsageError
from sparsmith.evaluating import TaskScore, headline, headline_sheet, normalised, suite_score
from sparsmith.evaluating.normalised import FOUR, SIX


@pytest.mark.parametrize(
    ("score", "chance", "expected"),
    [
        (55, 50, 10),
        (45, 50, -10),
        (50, 50, 0),
        (100, 50, 100),
        (0, 50, -100),
        (25, 25, 0),
        (62.5, 25, 50),
        (40, 0, 40),
        (0, 90, -900),
    ],
)
def test_by_hand(score, chance, expected):
    assert normalised(score, chance) == pytest.approx(expected, abs=1e-12)
    assert TaskScore(score, chance).normalised == normalised(score, chance)


@pytest.mark.parametrize(
    ("score", "chance"), [(101, 0), (-1, 0), (math.nan, 0), (math.inf, 0), (50, 100), (50, -1), (50, math.nan)]
)
def test_values_out_of_range_are_refused(score, chance):
    with pytest.raises(UsageError, match="percent"):
        normalised(score, chance)


def test_a_suite_is_the_plain_mean_of_its_tasks():
    assert suite_score({"a": TaskScore(55, 50), "b": TaskScore(45, 50), "c": TaskScore(30, 0)}) == pytest.approx(
        10.0, abs=1e-12
    )
    with pytest.raises(UsageError, match="no task"):
        suite_score({})
    with pytest.raises(UsageError, match="suite: b"):
        suite_score({"a": TaskScore(55, 50), "b": TaskScore(155, 50)})


def fixture():
    """Four suites with 10, 20, 0 and -10, and six scores with 40, 20, 0, 10, 30 and 20."""
    four = {
        "MMLU": {"x": TaskScore(32.5, 25)},
        "BBH": {"x": TaskScore(60, 50), "y": TaskScore(20, 0)},
        "reasoning": {"x": TaskScore(55, 50), "y": TaskScore(45, 50)},
        "QA": {"x": TaskScore(45, 50)},
    }
    six = {
        "MMLU direct": {"x": TaskScore(55, 25)},
        "MMLU CoT": {"x": TaskScore(40, 25)},
        "BBH direct": {"x": TaskScore(50, 50)},
        "BBH CoT": {"x": TaskScore(10, 0)},
        "TyDiQA": {"x": TaskScore(30, 0)},
        "MGSM": {"x": TaskScore(10, 0), "y": TaskScore(30, 0)},
    }
    return four, six


def test_the_headline_is_the_mean_of_four_suites():
    four, six = fixture()
    found = headline(four)
    assert found.scores == pytest.approx({"MMLU": 10, "BBH": 20, "reasoning": 0, "QA": -10}, abs=1e-12)
    assert found.four == pytest.approx(5.0, abs=1e-12) and found.six is None
    for name in FOUR:
        assert headline({**{key: tasks for key, tasks in four.items() if key != name}, **six}).four is None


def test_the_six_scores_are_averaged_only_where_all_are_there():
    four, six = fixture()
    assert headline(six).six == pytest.approx(20.0, abs=1e-12) and headline(six).four is None
    for name in SIX:
        assert headline({**four, **{key: tasks for key, tasks in six.items() if key != name}}).six is None
    with pytest.raises(UsageError, match="mmlu"):
        headline({"mmlu": four["MMLU"]})


def test_the_two_averages_never_share_a_column():
    four, six = fixture()
    sheet = headline_sheet({"paper's": headline(six), "ours": headline(four), "both": headline({**four, **six})})
    assert sheet.heads[-2:] == ("mean of four suites", "mean of six scores")
    assert [row[-2:] for row in sheet.rows] == [("-", "20.0"), ("5.0", "-"), ("5.0", "20.0")]
    assert sheet.rows[1][sheet.heads.index("QA")] == "-10.0" and sheet.rows[0][sheet.heads.index("QA")] == "-"
