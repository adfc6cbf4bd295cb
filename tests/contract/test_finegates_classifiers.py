"""FineGates on sequence classifiers: decoders and encoders, cut, kept and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import sparsmith as sm
from sparsmith import anatomy, app
from sparsmith.crafting.apply import check_roles
from sparsmith.crafting.settle import settle_report
from sparsmith.durable import read_json
from sparsmith.errors import MethodError
from sparsmith.methods.base import LoraSettings
from sparsmith.methods.finegates.gates import gates_of
from tests.kit.classifying import FEW, classifier_config, make_class_recipe
from tests.kit.pico import FFN, pico_ids, pico_model

LORA = LoraSettings(r=4, alpha=8, dropout=0.0)


def built(family: str):
    return AutoModelForSequenceClassification.from_config(classifier_config(family), attn_implementation="eager").eval()


def logits(model):
    ids, mask = pico_ids(3, 14, seed=5), torch.ones(3, 14, dtype=torch.int64)
    ids[1, 9:], mask[1, 9:] = 0, 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def gated(family: str, **options):
    """A base and the same crafted, every trained tensor moved and the choice made."""
    base = built(family)
    config = sm.FineGatesConfig(target=0.75, lora=LORA, **options)
    model = sm.craft(base, config).eval()
    assert torch.equal(logits(model), logits(base)), "crafting leaves the logits as they were"
    assert check_roles(model) == sm.plan(base, config).trained
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for method, settings in model.sparsmith.parts:
        method.settle(model, settings)
    return base, model


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("family", FEW)
def test_the_cut_classifier_is_the_gated_one(family, blocks):
    base, model = gated(family, gates={"blocks": blocks})
    before = logits(model)
    settled = sm.settle(model)
    assert not gates_of(settled) and type(settled) is type(base)
    assert (logits(settled) - before).abs().max() <= 1e-5  # a shorter sum over the kept channels rounds differently
    width = getattr(settled.config, "intermediate_size", None) or settled.config.n_inner
    assert width < FFN and settle_report(settled).removed > 0
    recount = sum(p.numel() for p in settled.parameters())
    assert anatomy.shape_of(settled).total_params == recount < sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_clean_process_opens_it(family, tmp_path):
    _, model = gated(family)
    report = sm.export(model, tmp_path / "out")
    assert report.proof["bitwise"] and report.proof["class"].endswith("ForSequenceClassification")
    again = sm.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(sm.settle(model)))


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.long), "roberta"])
def test_the_class_head_is_rounded_with_the_rest(family, tmp_path):
    _, model = gated(family)
    report = sm.export(model, tmp_path / "out", dtype="bfloat16")
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert report.proof["passed"] and kinds == {torch.bfloat16}


def test_a_rate_for_a_head_that_is_not_there_is_refused():
    with pytest.raises(MethodError, match="head_lr"):
        sm.craft(pico_model(), sm.FineGatesConfig(head_lr=0.01))


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.long), "bert"])
def test_a_recipe_ends_in_a_smaller_classifier_that_has_learned(family, tmp_path):
    path = make_class_recipe(tmp_path, family, steps=60, eval_every=None, save_every=None)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["methods"] = [{"method": "finegates", "target": 0.75, "gates": {"lr": 0.1}, "lora": LORA.model_dump()}]
    recipe["train"]["learning_rate"] = 5e-3
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run = app.tune(path)
    evaluation = read_json(Path(run) / "eval.json")
    tuned, base = (evaluation[name]["overall"]["accuracy"]["value"] for name in ("tuned", "base"))
    assert (
        tuned >= base
        and evaluation["tuned"]["overall"]["loss"]["value"] < evaluation["base"]["overall"]["loss"]["value"]
    )
    model = sm.load(run)
    dense = model.base_model.num_parameters()
    assert sm.settle(model).base_model.num_parameters() < dense
