"""Sequence classifiers of every family: counted, opened, crafted, kept and exported."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.apply import check_roles
from sparsmith.crafting.base_model import load_base, load_tokenizer
from sparsmith.errors import CheckpointMismatch, MethodError, UnsupportedAnatomy
from sparsmith.exporting import export
from sparsmith.methods import registry
from sparsmith.methods.base import LoraSettings
from sparsmith.recipe.schema import ModelSettings
from tests.kit.classifying import CLASSIFIED, FEW, HEAD, HeadConfig, classifier_config, save_pretrained_base
from tests.kit.pico import pico_ids, pico_model


@pytest.fixture(autouse=True)
def registered():
    registry.register(HEAD)
    yield
    registry.unregister("head")


def settings(folder, **changes) -> ModelSettings:
    return ModelSettings(**{"path": str(folder), "task": "seq_cls", "num_labels": 3, **changes})


def built(family: str, classes: int = 3):
    config = classifier_config(family, classes)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()


def trained_like(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def logits(model):
    ids, mask = pico_ids(3, 14, seed=5), torch.ones(3, 14, dtype=torch.int64)
    ids[1, 9:], mask[1, 9:] = 0, 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("family", CLASSIFIED)
def test_counts_are_those_of_the_built_model(family):
    model = built(family)
    shape = anatomy.shape_of(model)
    assert shape.total_params == sum(p.numel() for p in model.parameters())
    assert shape.classifier_params == sum(p.numel() for _, p in anatomy.classifier_tensors(model))
    assert shape == anatomy.shape_of(anatomy.for_task(model.config, "seq_cls"))
    anatomy.probe(model)


@pytest.mark.parametrize("family", CLASSIFIED)
def test_a_plan_is_what_is_crafted(family):
    planned = sm.plan(classifier_config(family), HeadConfig(), task="seq_cls", classes=5)
    model = sm.craft(built(family, 5), HeadConfig(), inplace=True)
    assert check_roles(model) == planned.trained
    base = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    assert planned.base_params == planned.total_params == base
    assert model.sparsmith.neutral["bitwise"] is True


def test_encoders_name_their_linears_by_path():
    row = anatomy.of(classifier_config("bert"))
    model = built("bert")
    config = HeadConfig(lora=LoraSettings(r=2, targets=("attention.output.dense", "query")))
    crafted = sm.craft(model, config)
    held = {
        name.split(".lora_")[0].split("layer.")[1][2:] for name, _ in crafted.named_parameters() if ".lora_" in name
    }
    assert held == {"attention.output.dense", "attention.self.query"}
    assert tuple(row.linears)[-2:] == ("intermediate.dense", "output.dense")
    with pytest.raises(UnsupportedAnatomy, match="no module that is the ffn alone"):
        anatomy.ffn_of(anatomy.blocks(model)[0], row)
    with pytest.raises(MethodError, match=r"lora\.targets: found `qury`.*Did you mean `query`"):
        sm.craft(model, HeadConfig(lora=LoraSettings(targets=("qury",))))


@pytest.mark.parametrize("family", FEW)
def test_a_head_that_the_checkpoint_lacks_comes_from_its_own_stream(tmp_path, family):
    save_pretrained_base(tmp_path, family)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = load_base(settings(tmp_path), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = load_base(settings(tmp_path), seed=7), load_base(settings(tmp_path), seed=8)
    named = [dict(anatomy.classifier_tensors(model)) for model in (one, again, other)]
    for name, drawn in named[0].items():
        assert torch.equal(drawn, named[1][name])
        assert name.endswith("bias") == torch.equal(drawn, named[2][name])
    assert one.config.pad_token_id == load_tokenizer(settings(tmp_path)).pad_token_id == 0
    held = load_file(tmp_path / "model.safetensors")
    state = one.state_dict()
    shared = [name for name in state if name in held]
    assert len(shared) == len(state) - len(named[0]) and all(torch.equal(state[n], held[n]) for n in shared)


def test_anything_else_that_is_missing_or_foreign_is_refused(tmp_path):
    from tests.kit.checkpoints import edit_tensors

    save_pretrained_base(tmp_path / "a", "llama")
    edit_tensors(tmp_path / "a/model.safetensors", lambda t: t.pop("model.norm.weight"), sealed=False)
    with pytest.raises(CheckpointMismatch, match=r"model\.norm\.weight: found no such tensor"):
        load_base(settings(tmp_path / "a"))
    save_pretrained_base(tmp_path / "b", "llama")
    edit_tensors(tmp_path / "b/model.safetensors", lambda t: t.update(odd=torch.ones(2)), sealed=False)
    with pytest.raises(CheckpointMismatch, match="odd: found a tensor that nothing asks for"):
        load_base(settings(tmp_path / "b"))
    built("roberta").save_pretrained(tmp_path / "c")
    edit_tensors(tmp_path / "c/model.safetensors", lambda t: t.pop("classifier.out_proj.bias"), sealed=False)
    with pytest.raises(CheckpointMismatch, match=r"classifier\.out_proj\.bias: found no such tensor"):
        load_base(settings(tmp_path / "c"))
    with pytest.raises(CheckpointMismatch, match="a class head of another size"):
        load_base(settings(save_and_name(tmp_path / "d"), num_labels=2))
    with pytest.raises(UnsupportedAnatomy, match=r"Set model\.task to seq_cls"):
        load_base(ModelSettings(path=str(save_pretrained_base(tmp_path / "e", "bert"))))


def save_and_name(folder):
    built("llama").save_pretrained(folder)
    return folder


def test_a_trained_head_is_kept(tmp_path):
    model = built("llama")
    model.save_pretrained(tmp_path)
    again = load_base(settings(tmp_path))
    assert torch.equal(again.score.weight, model.score.weight)


def test_padding_is_named_where_neither_config_nor_tokenizer_has_one(tmp_path):
    save_pretrained_base(tmp_path, "llama", pad_token_id=None)
    import json

    file = tmp_path / "tokenizer_config.json"
    said = json.loads(file.read_text())
    said.pop("pad_token")
    file.write_text(json.dumps(said))
    model, tokenizer = load_base(settings(tmp_path)), load_tokenizer(settings(tmp_path))
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_methods_for_other_tasks_are_refused_by_name():
    pesc = sm.PescConfig(num_experts=4, adapter_dim=16)
    for refused in (lambda: sm.craft(built("llama"), pesc), lambda: sm.plan(built("llama"), pesc)):
        with pytest.raises(
            MethodError, match=r"`pesc`, which does causal_lm, for the task seq_cls.*Methods that do: .*head"
        ):
            refused()
    with pytest.raises(MethodError, match="`head`, which does seq_cls, for the task causal_lm"):
        sm.craft(pico_model("llama"), HeadConfig())


@pytest.mark.parametrize(
    "family", [one if one in ("llama", "bert") else pytest.param(one, marks=pytest.mark.long) for one in FEW]
)
def test_delta_full_and_export_come_back(tmp_path, family):
    base = save_pretrained_base(tmp_path / "base", family)
    names = ("north", "south", "west")
    model = trained_like(sm.craft(load_base(settings(base), labels=names, seed=5), HeadConfig(), inplace=True, seed=5))
    wanted = logits(model)
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta")
    assert torch.equal(logits(again), wanted) and again.config.id2label == dict(enumerate(names))
    assert again.sparsmith.base.task == "seq_cls" and again.sparsmith.base.labels == names
    sm.save(model, tmp_path / "full", full=True)
    full = sm.load(tmp_path / "full")
    assert torch.allclose(logits(full), wanted, atol=1e-5)
    report = export(model, tmp_path / "export", tokenizer=load_tokenizer(settings(base)))
    assert report.proof["passed"] and report.proof["class"].endswith("ForSequenceClassification")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    assert torch.allclose(logits(stock), wanted, atol=1e-5)
    assert stock.config.id2label == dict(enumerate(names)) and stock.config.pad_token_id == 0
    assert "AutoModelForSequenceClassification" in (tmp_path / "export/README.md").read_text()


def test_a_delta_is_refused_on_a_base_for_another_task(tmp_path):
    base = save_pretrained_base(tmp_path / "base", "llama")
    model = sm.craft(load_base(settings(base)), HeadConfig(), inplace=True)
    sm.save(model, tmp_path / "delta")
    with pytest.raises(CheckpointMismatch, match=r"base\.task: found causal_lm; expected seq_cls"):
        sm.load(tmp_path / "delta", base=load_base(ModelSettings(path=str(base))))


def test_a_half_precision_base_trains_its_head_in_float32_and_settles_to_its_own_type(tmp_path):
    base = save_pretrained_base(tmp_path / "base", "llama")
    model = sm.craft(load_base(settings(base, dtype="bfloat16")), HeadConfig(), inplace=True)
    assert model.score.weight.dtype == torch.float32 and model.model.norm.weight.dtype == torch.bfloat16
    wanted = logits(trained_like(model))
    assert wanted.dtype == torch.float32
    report = export(model, tmp_path / "export")
    assert report.proof["passed"]
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export", dtype="auto").eval()
    assert stock.score.weight.dtype == torch.bfloat16
    assert torch.allclose(logits(stock).float(), wanted, atol=0.02 * wanted.abs().max().item() + 1e-3)
    assert model.score.weight.dtype == torch.float32


def test_rows_must_fit_into_the_positions_of_an_encoder(tmp_path):
    from sparsmith import app
    from sparsmith.errors import RecipeError
    from tests.kit.classifying import make_class_recipe

    recipe = make_class_recipe(tmp_path, "roberta")
    plan = app.plan(recipe)
    assert plan.trained["classifier"] == 64 * 64 + 64 + 2 * 64 + 2 and plan.as_dict()["parameters"]["base"] > 0
    with pytest.raises(RecipeError, match="`96`; expected at most 95"):
        app.plan(recipe, ["data.max_length=96"])
