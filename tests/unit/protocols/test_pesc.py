"""The protocol's variants and its arithmetic, on cells made by hand; the real run is a trial of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsmith.bootstrap import RowScores
from sparsmith.errors import MethodError, UsageError
from sparsmith.evaluating import EvalResult
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.protocols.pesc import CONTROLS, compare, variant
from sparsmith.recipe.schema import DataSettings, EvalSource, ModelSettings, Recipe, TrainSettings, TrainSource
from sparsmith.runs import RunFolder


def recipe(config=None):
    source = {"name": "s", "domain": "a", "path": "rows.jsonl"}
    return Recipe(
        model=ModelSettings(path="embedded"),
        methods=(config or PescConfig(num_experts=4, top_k=2, adapter_dim=8, balance_alpha=0.02),),
        data=DataSettings(train=(TrainSource(**source),), eval=(EvalSource(**source),)),
        train=TrainSettings(steps=3),
        output="out",
    )


def fake_tune(loss_of, calls):
    """Stands for the tuning alone: writes the files that a finished run leaves."""

    def tune(one, label):
        calls.append(label)
        folder = RunFolder(Path(one.output))
        folder.root.mkdir(parents=True)
        control = folder.root.name.rsplit("-seed", 1)[0]
        losses = tuple(loss_of(control, one.train.seed, row) for row in range(40))
        rows = {"s": {"loss": RowScores(losses, (1.0,) * 40)}}
        result = EvalResult.of(rows, {"s": "a"}, seed=0, resamples=50, fingerprints={"s": "x"})
        folder.evaluation.write_text(json.dumps({"base": result.to_json(), "tuned": result.to_json()}))
        plan = {
            "parameters": {"trained_total": 10, "active": 20, "total": 30},
            "flops_per_token": {"forward": 40},
        }
        folder.plan.write_text(json.dumps(plan))
        facts = {"tokens_per_second": 50.0, "machine": {}, "versions": {}, "steps": 3, "rows": 48}
        folder.facts.write_text(json.dumps({**facts, "finished": "now"}))
        return folder.root

    return tune


def test_every_control_is_a_valid_recipe():
    for name in CONTROLS:
        config = variant(recipe(), name, 5, Path("x")).methods[0]
        assert config.num_experts == 4 and config.adapter_dim == 8
    assert variant(recipe(), "learned", 5, Path("x")).methods[0].balance_alpha == 0.02
    assert variant(recipe(), "random", 5, Path("x")).train.seed == 5
    assert variant(recipe(), "single_adapter", 5, Path("x")).methods[0].control == "single_adapter"


def test_differences_are_paired_within_each_seed(tmp_path):
    gap = {"learned": 0.0, "random": 0.1, "single_adapter": 0.2}
    calls = []
    out = compare(
        recipe(), list(gap), [0, 1], tmp_path, fake_tune(lambda c, seed, row: 2 + seed + 0.05 * row + gap[c], calls)
    )
    assert len(calls) == 6
    difference = out.difference("random")
    # the rows differ far more than the controls do: only pairing gives an interval of no width
    assert difference.value == pytest.approx(0.1) and difference.high - difference.low < 1e-9
    assert out.verdict().startswith("routing helps")
    assert out.rows()[0]["minus_learned"] is None and out.rows()[1]["loss"] == pytest.approx(
        out.losses("random")[0] + 0.5
    )
    assert json.loads((tmp_path / "comparison.json").read_text())["verdict"] == out.verdict()
    assert "| single_adapter |" in (tmp_path / "comparison.md").read_text()


def test_finished_cells_are_not_run_again(tmp_path):
    calls = []
    tune = fake_tune(lambda c, seed, row: 1.0, calls)
    compare(recipe(), ["learned"], [0], tmp_path, tune)
    compare(recipe(), ["learned", "random"], [0], tmp_path, tune)
    assert calls == ["learned seed 0", "random seed 0"]


def test_no_claim_without_both_controls(tmp_path):
    out = compare(recipe(), ["learned", "random"], [0], tmp_path, fake_tune(lambda c, s, r: 1.0, []))
    assert out.verdict().startswith("routing: not tested")
    out = compare(
        recipe(),
        ["learned", "random", "single_adapter"],
        [0],
        tmp_path,
        fake_tune(lambda c, s, r: 1.0 + (c == "random"), []),
    )
    assert "neither" in out.verdict()  # the first two cells were read as they were: all equal


def test_faults(tmp_path):
    tune = fake_tune(lambda c, s, r: 1.0, [])
    with pytest.raises(UsageError, match="single_adapter"):
        compare(recipe(), ["single_adaptor"], [0], tmp_path, tune)
    with pytest.raises(UsageError, match="no seeds"):
        compare(recipe(), ["learned"], [], tmp_path, tune)
    with pytest.raises(MethodError, match="learned routing"):
        compare(recipe(PescConfig(router="random")), ["learned"], [0], tmp_path, tune)
