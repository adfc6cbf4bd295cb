"""Prune, then spend the freed budget on experts: one recipe of two stages, from plan to export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparsmith as sm
from sparsmith import app
from sparsmith.errors import MethodError
from sparsmith.methods.finegates.gates import gates_of
from sparsmith.methods.pesc.layers import adapters_of
from tests.kit.pico import FFN, pico_ids, pico_model
from tests.kit.staged_run import STEPS, staged_recipe

SLIM = {
    "method": "finegates",
    "target": 0.75,
    "gates": {"lr": 0.8},
    "schedule": {"hold": 0.2, "warmup": 0.3, "settle_at": 0.5},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    recipe = staged_recipe(tmp_path_factory.mktemp("pruned"), SLIM)
    app.tune(recipe)
    return recipe.parent / "run"


def test_the_plan_knows_the_smaller_base_without_a_weight(run):
    first, second = app.plan(run.parent / "recipe.yaml").stages
    assert first.plan.total_params < first.plan.base_params
    assert second.plan.base_params == first.plan.total_params < second.plan.total_params


def test_the_experts_stand_on_the_pruned_model(run):
    first = json.loads((run / "stages" / "1-first" / "settled" / "config.json").read_text())
    assert first["model_type"] == "llama" and first["intermediate_size"] < FFN
    model = sm.load(run)
    assert len(adapters_of(model)) == model.config.num_hidden_layers and not gates_of(model)
    assert model.config.base_config.intermediate_size == first["intermediate_size"]
    steps = [json.loads((stage / "run.json").read_text())["steps"] for stage in sorted((run / "stages").iterdir())]
    assert tuple(steps) == STEPS
    planned = app.plan(run.parent / "recipe.yaml").stages[1].plan.as_dict()["parameters"]
    assert json.loads((run / "stages" / "2-pesc" / "plan.json").read_text())["parameters"] == planned


def test_the_export_opens_without_us(run, tmp_path):
    report = sm.export(run, tmp_path / "out")
    assert report.proof["bitwise"] and report.proof["refused_without_code"]
    ids = pico_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(sm.load(tmp_path / "out")(ids).logits, sm.settle(sm.load(run))(ids).logits)


def test_both_at_once_is_another_matter():
    """In one stage the experts' shared FFN would be cut while they learn around it: allowed, and settled exactly."""
    pair = (
        sm.FineGatesConfig(gates={"lr": 0.1}),
        sm.PescConfig(num_experts=4, top_k=2, adapter_dim=16, lora={"enabled": False}),
    )
    model = sm.craft(pico_model(), pair)
    settled = sm.settle(model)
    ids = pico_ids(2, 12)
    with torch.no_grad():
        for method, config in model.sparsmith.parts:
            method.settle(model, config)
        assert (settled(ids).logits - model(ids).logits).abs().max() <= 1e-5
    assert settled.config.base_config.intermediate_size < FFN


def test_layers_of_unequal_width_cannot_be_followed(tmp_path):
    recipe = staged_recipe(tmp_path, {**SLIM, "settle": {"scope": "global"}})
    with pytest.raises(MethodError, match="scope"):
        app.plan(recipe)
