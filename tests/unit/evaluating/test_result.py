from __future__ import annotations

import json

import pytest

from sparsmith.bootstrap import RowScores
from sparsmith.errors import CheckpointError
from sparsmith.evaluating import EvalResult, result_table
from sparsmith.evaluating.show import plain_text


def result(shift: float = 0.0, print_: str = "f") -> EvalResult:
    rows = {
        "a": {
            "loss": RowScores((2.0 + shift, 4.0 + 2 * shift), (1.0, 2.0)),
            "exact_match": RowScores((1.0, 0.0), (1.0, 1.0)),
        },
        "b": {"loss": RowScores((6.0, 6.0), (2.0, 2.0))},
    }
    return EvalResult.of(
        rows,
        {"a": "maths", "b": "code"},
        seed=1,
        resamples=200,
        fingerprints={"a": print_, "b": "g"},
        answers={"a": ("x", "y")},
    )


def test_json_and_back():
    first = result()
    text = json.dumps(first.to_json())
    assert EvalResult.from_json(text) == first == EvalResult.from_json(json.loads(text))


@pytest.mark.parametrize("raw", ["{", "[]", "{}", '{"format": 99}', "null"])
def test_other_data_is_refused(raw):
    with pytest.raises(CheckpointError, match="eval result"):
        EvalResult.from_json(raw)


def test_differences_are_paired_where_the_rows_are_the_same():
    gap = result(-0.5).minus(result())
    assert gap.sets["a"]["loss"].value == pytest.approx(-0.5)
    assert gap.overall["loss"].value == pytest.approx(-0.25)
    assert set(result(-0.5, "other").minus(result()).sets) == {"b"}


def test_the_table_names_the_best():
    from io import StringIO

    from rich.console import Console

    table = result_table({"base": result(), "tuned": result(-0.5)})
    text = plain_text(table)
    assert "2.000 [2.000, 2.000]" in text and "1.500 [1.500, 1.500]" in text
    assert "50.0 % [0.0, 100.0]" in text and "mean of domains" in text
    console = Console(file=StringIO(), width=140, force_terminal=True, color_system="standard")
    console.print(table)
    assert "\x1b[1m1.500 [1.500, 1.500]" in console.file.getvalue()
    assert "\x1b[1m50.0" not in console.file.getvalue()  # a tie has no best
    assert "held-out loss" in result().text("tuned")
    assert "code" in plain_text(result_table({"x": result()})) and " b " in plain_text(
        result_table({"x": result()}, by_set=True)
    )
