"""Averages over clean and over seen sets, apart."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from sparsmith.bootstrap import RowScores
from sparsmith.data.overlap_report import OverlapReport, SetOverlap
from sparsmith.errors import UsageError
from sparsmith.evaluating import ApartResult, DepthResult, EvalResult, clean_and_seen

LOSSES = {"gsm8k_test": 1.0, "mmlu": 3.0, "bbh": 5.0, "boolq": 2.0}
DOMAINS = {"gsm8k_test": "maths", "mmlu": "general", "bbh": "maths", "boolq": "general"}


def result(shift: float = 0.0, names=tuple(LOSSES)) -> EvalResult:
    rows = {
        name: {
            "loss": RowScores((LOSSES[name] + shift,) * 3, (1.0,) * 3),
            "exact_match": RowScores((1.0, 0.0, 0.0), (1.0,) * 3),
        }
        for name in names
    }
    return EvalResult.of(
        rows, {name: DOMAINS[name] for name in names}, seed=1, resamples=50, fingerprints=dict.fromkeys(names, "f")
    )


def report(seen=("gsm8k_test", "boolq"), names=tuple(LOSSES)) -> OverlapReport:
    sets = {name: SetOverlap(name, name, {"family x": ["t"]} if name in seen else {}) for name in names}
    return OverlapReport(sets, {"t": 0}, "families and files alone")


def shown(thing) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_each_side_is_the_mean_of_the_domains_of_its_own_sets():
    found = clean_and_seen(result(), report())
    assert found.clean_sets == ("mmlu", "bbh") and found.seen_sets == ("gsm8k_test", "boolq") and found.both
    assert found.clean["loss"].value == pytest.approx((3.0 + 5.0) / 2)
    assert found.seen["loss"].value == pytest.approx((1.0 + 2.0) / 2)
    assert found.clean["loss"].n == found.seen["loss"].n == 6
    # what is seen does not move the clean average, to the bit
    alone = clean_and_seen(result(names=("mmlu", "bbh")), report())
    assert alone.clean == found.clean and alone.seen == {} and not alone.both


def test_a_contaminated_set_is_not_clean():
    base = report(seen=())
    spoilt = replace(base.sets["mmlu"], searched=True, rows=100, met_rows=2, ngram_rows=2)
    found = clean_and_seen(result(), replace(base, sets={**base.sets, "mmlu": spoilt}))
    assert found.seen_sets == ("mmlu",) and found.seen["loss"].value == pytest.approx(3.0)


def test_a_set_of_which_nothing_is_known_is_refused():
    with pytest.raises(UsageError, match="mmlu"):
        clean_and_seen(result(), report(names=("gsm8k_test", "bbh", "boolq")))


def test_no_average_over_both_kinds_is_printed_or_written():
    text = shown(ApartResult(result(), report()))
    assert "clean: mmlu, bbh" in text and "seen: gsm8k_test, boolq" in text
    assert "4.000 [4.000, 4.000]" in text and "1.500 [1.500, 1.500]" in text
    assert "mean of domains" not in text and "2.750" not in text  # the mean over all four
    data = json.loads(json.dumps(ApartResult(result(), report()).as_dict()))
    assert data["overall"] == {} == data["domains"] and set(data["sets"]) == set(LOSSES)
    averages = data["overlap"]["averages"]
    assert averages["clean"]["overall"]["loss"]["value"] == 4.0 and averages["seen"]["sets"] == ["gsm8k_test", "boolq"]
    assert data["overlap"]["sets"]["boolq"] == {"verdict": "seen", "shared": {"family x": ["t"]}}
    assert EvalResult.from_json(data).sets == result().sets


@pytest.mark.parametrize(
    ("seen", "words"), [(tuple(LOSSES), "of a family that was trained on"), ((), "Every set is clean")]
)
def test_sets_of_one_kind_are_shown_as_ever_and_named(seen, words):
    apart = ApartResult(result(), report(seen))
    text = shown(apart)
    assert "mean of domains" in text and words in text
    assert apart.as_dict()["overall"] == result().to_json()["overall"]


def test_every_depth_has_its_averages():
    depths = DepthResult({2: result(1.0), 4: result()})
    apart = ApartResult(depths, report())
    assert apart.apart()["depth 2"].clean["loss"].value == pytest.approx(5.0)
    text = shown(apart)
    assert "depth 2" in text and "5.000" in text and "4.000" in text
    data = apart.as_dict()
    assert data["depths"]["2"]["overall"] == {} and set(data["overlap"]["averages"]) == {"depth 2", "depth 4"}
