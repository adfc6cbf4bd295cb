"""Experts and depth in one model: every depth is a PESC checkpoint of its own."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.errors import MethodError
from sparsmith.methods.base import LoraSettings
from sparsmith.methods.pesc.layers import adapters_of
from sparsmith.training.objective import Objective
from tests.kit.cases import METHODS, trained_like
from tests.kit.depths import deep_model, labelled_batch
from tests.kit.pico import pico_ids
from tests.kit.rows import RowDataset, pad_rows

LORA = LoraSettings(r=4, alpha=8)
PESC = {"num_experts": 4, "top_k": 2, "adapter_dim": 16}


def logits(model):
    with torch.no_grad():
        return model(pico_ids(3, 20, seed=8), use_cache=False).logits


def pair(order="pesc first", layers="all", **soft):
    pesc = sm.PescConfig(**PESC, layers=layers, lora=LoraSettings(enabled=False))
    configs = [pesc, sm.SoftConfig(exits=(1, 2, 4), **soft)]
    return configs if order == "pesc first" else configs[::-1]


def as_trained(configs, seed=3):
    model = sm.craft(deep_model(), configs, proof=False).eval()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.03)
    return model


@pytest.mark.parametrize("order", ["pesc first", "soft first"])
def test_every_depth_is_a_checkpoint_with_its_own_experts(order, tmp_path):
    model = as_trained(pair(order))
    reports = sm.export(model, tmp_path / "out", depths="all", proof=False)
    for depth, report in zip((1, 2, 4), reports):
        folder = tmp_path / "out" / f"depth-{depth}"
        config = json.loads((folder / "config.json").read_text())
        assert config["pesc"]["layers"] == list(range(depth)) and config["base_config"]["num_hidden_layers"] == depth
        again = sm.load(folder)
        assert len(adapters_of(again)) == depth and depths_of(again) == tuple(n for n in (1, 2, 4) if n <= depth)
        assert torch.equal(logits(again), logits(at_depth(model, depth)))
        assert report.needs_code and set(report.elsewhere()) <= {"transformers"}
    assert model.config.pesc["layers"] == [0, 1, 2, 3] and model.settings.layers == (0, 1, 2, 3)
    assert model.config.num_hidden_layers == 4


def test_a_slice_opens_without_us(tmp_path):
    model = trained_like(METHODS["pesc, soft LoRA"], "llama")
    report = sm.export(model, tmp_path / "out", depth=2)
    assert report.proof["bitwise"] and report.proof["refused_without_code"]
    assert report.proof["class"] == "SparsmithPescForCausalLM"
    assert "do not know this architecture" in str(report) and "vllm serve" not in str(report)


def test_below_the_first_expert_a_slice_is_a_plain_model(tmp_path):
    model = as_trained(pair(layers=(2, 3)))
    report = sm.export(model, tmp_path / "out", depth=2, proof=False)
    assert report.model_type == "llama" and not report.needs_code
    assert torch.equal(logits(sm.load(tmp_path / "out")), logits(at_depth(model, 2)))
    sm.export(as_trained(pair(layers="every-2")), tmp_path / "every", depth=2, proof=False)
    again = sm.load(tmp_path / "every")
    assert again.sparsmith.configs[0].layers == (1,) and len(adapters_of(again)) == 1


@pytest.mark.parametrize("router", ["random", "hash"])
def test_routers_without_weights_choose_the_same_experts_in_a_slice(router, tmp_path):
    pesc = sm.PescConfig(**PESC, router=router, lora=LoraSettings(enabled=False))
    model = as_trained([pesc, sm.SoftConfig(exits=(2, 4))])
    sm.export(model, tmp_path / "out", depth=2, proof=False)
    assert torch.equal(logits(sm.load(tmp_path / "out")), logits(at_depth(model, 2)))


def test_the_scale_can_be_folded_in(tmp_path):
    model = as_trained(pair())
    sm.export(model, tmp_path / "out", depth=2, fold_scale=True, proof=False)
    again = sm.load(tmp_path / "out")
    assert again.config.pesc["adapter_scale"] == 1.0 and model.config.pesc["adapter_scale"] == 0.25
    assert (logits(again) - logits(at_depth(model, 2))).abs().max() <= 1e-5


@pytest.mark.parametrize("order", ["pesc first", "soft first"])
def test_the_loss_is_that_of_the_depths_and_of_the_routers(order):
    configs = pair(order)
    model = as_trained(configs).train()
    batch = labelled_batch()
    told = Objective(model)(**batch)
    alone = {}
    for depth in (1, 2, 4):
        view = at_depth(model, depth)
        out = view.base(**batch, use_cache=False)
        alone[depth] = out.loss.item()
    assert told["terms"]["task"].item() == pytest.approx(sum(alone.values()) / 3, abs=1e-5)
    assert set(told["terms"]) == {"task", "pesc.balance"}
    assert told["loss"].item() == pytest.approx(
        told["terms"]["task"].item() + 0.01 * told["terms"]["pesc.balance"].item()
    )
    told["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["pesc, soft", "pesc, soft LoRA"])
def test_they_tune_together(name, tmp_path):
    model = sm.craft(deep_model(), METHODS[name], seed=2)
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=16,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=4,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    tuner = sm.Tuner(model=model, args=args, train_dataset=RowDataset(60), data_collator=pad_rows, moved_after=8)
    tuner.train()
    lines = [line for line in tuner.state.log_history if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"health/soft/loss_at_2", "health/soft/loss_at_4", "term/pesc.balance"} <= set(lines[-1])
    assert all(value > 0 for value in tuner.roles_move.result["value"].values())
    model.eval()
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=deep_model())
    assert torch.equal(logits(at_depth(again, 2)), logits(at_depth(model, 2)))


@pytest.mark.parametrize("frozen", [{"trunk": "frozen"}, {"arm": "ict"}])
@pytest.mark.parametrize("order", ["pesc first", "soft first"])
def test_a_frozen_trunk_leaves_experts_nothing_to_learn(order, frozen):
    for act in (sm.plan, sm.craft):
        with pytest.raises(MethodError, match="`pesc` beside `soft` with a frozen trunk"):
            act(deep_model() if act is sm.craft else deep_model().config, pair(order, **frozen))


def test_settings_that_contradict_are_refused():
    soft = sm.SoftConfig(exits=(2, 4))
    with pytest.raises(MethodError, match="trains the linears themselves"):
        sm.craft(deep_model(), [sm.PescConfig(**PESC, lora=LORA), soft])
    other = sm.SoftConfig(exits=(2, 4), tune="lora", lora=LoraSettings(r=8, alpha=8))
    with pytest.raises(MethodError, match="different settings"):
        sm.craft(deep_model(), [sm.PescConfig(**PESC, lora=LORA), other])


def test_the_seed_of_the_run_draws_the_exits_in_either_order():
    from sparsmith.methods.soft.parts import state_of

    for order in ("pesc first", "soft first"):
        model = sm.craft(deep_model(), pair(order, schedule="sampled"), seed=77, proof=False)
        assert state_of(model).seed == 77 and state_of(anatomy.base_of(model)) is state_of(model)
