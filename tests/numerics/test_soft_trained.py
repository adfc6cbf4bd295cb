"""What trains under each way of tuning, what stays to the bit, and what a slice computes then."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.errors import MethodError, TiedHeadError
from sparsmith.methods.base import LoraSettings
from sparsmith.training.objective import Objective
from tests.kit.depths import FAMILIES, deep_model, exits_for, labelled_batch
from tests.kit.pico import pico_ids

LORA = LoraSettings(r=4, alpha=8)
STEPS = 20


def stepped(model: Any, steps: int = STEPS, lr: float = 1e-2) -> Any:
    """Real optimiser steps by hand."""
    loss_of = Objective(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        loss_of(**labelled_batch(seed=step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "settings", [{}, {"schedule": "sandwich"}, {"kl": {"weight": 0.5}}], ids=["all", "sandwich", "kl"]
)
def test_a_frozen_trunk_stays_to_the_bit(family, settings):
    base = deep_model(family)
    model = sm.craft(base, sm.SoftConfig(exits=exits_for(family), trunk="frozen", **settings))
    before, wanted = bits(model), base(pico_ids()).logits
    stepped(model)
    after = bits(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and moved == {name for name in before if name.startswith("soft_exits.")}
    assert torch.equal(model(pico_ids()).logits, wanted)


def test_a_frozen_trunks_exit_starts_as_the_next_block():
    base = deep_model()
    model = sm.craft(base, sm.SoftConfig(exits=(1, 2, 4), trunk="frozen"))
    two = sm.craft(base, sm.SoftConfig(exits=(1, 2, 3, 4)), proof=False)
    for depth in (1, 2):
        assert torch.equal(at_depth(model, depth)(pico_ids()).logits, at_depth(two, depth + 1)(pico_ids()).logits)
        assert at_depth(model, depth).config.num_hidden_layers == depth + 1


def test_heads_of_their_own_leave_the_trunk_alone():
    base = deep_model()
    model = sm.craft(base, sm.SoftConfig(exits=(1, 3, 4), arm="ict"))
    before = bits(model)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters()) == 2 * 128 * 64
    stepped(model, 5)
    moved = {name for name, p in bits(model).items() if not torch.equal(before[name], p)}
    assert moved == {"soft_exits.1.head.weight", "soft_exits.3.head.weight"}
    assert torch.equal(model(pico_ids()).logits, base(pico_ids()).logits)
    logits = at_depth(model, 1)(pico_ids()).logits
    assert not torch.allclose(logits, at_depth(sm.craft(base, sm.SoftConfig(exits=(1, 4))), 1)(pico_ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_lora_the_norm_moves_and_the_head_does_not(family):
    """Spec test 16."""
    model = sm.craft(deep_model(family), sm.SoftConfig(exits=exits_for(family), tune="lora", lora=LORA))
    before = bits(model)
    stepped(model, 3)
    moved = {name for name, p in bits(model).items() if not torch.equal(before[name], p)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trained
    others = {name for name in moved if ".lora_" not in name}
    assert others and all("norm" in name or "ln_f" in name for name in others)
    settled = sm.settle(copy.deepcopy(model))
    for depth in depths_of(model):
        live, merged = (at_depth(one, depth)(pico_ids()).logits for one in (model, settled))
        assert (live - merged).abs().max() <= 1e-5


def test_the_norm_may_stay_too():
    model = sm.craft(deep_model(), sm.SoftConfig(exits=(2, 4), tune="lora", lora=LORA, train_norm=False))
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_tied_head_trains_under_lora_only_when_it_is_untied(family, tmp_path):
    base = deep_model(family)
    exits = exits_for(family)
    with pytest.raises(TiedHeadError, match="untie"):
        sm.craft(base, sm.SoftConfig(exits=exits, tune="lora", lora=LORA, head="train"))
    config = sm.SoftConfig(exits=exits, tune="lora", lora=LORA, head="train", untie=True)
    plan, model = sm.plan(base.config, config), sm.craft(base, config)
    assert base.config.tie_word_embeddings and not model.config.tie_word_embeddings
    assert plan.trained_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    built = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    assert plan.total_params == built
    table = model.get_input_embeddings().weight.detach().clone()
    stepped(model, 5)
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert not torch.equal(model.get_output_embeddings().weight, table)
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=base)
    assert torch.equal(again(pico_ids()).logits, model(pico_ids()).logits)
    sm.save(model, tmp_path / "full", full=True)
    full = sm.load(tmp_path / "full")
    assert torch.equal(full(pico_ids()).logits, sm.settle(copy.deepcopy(model))(pico_ids()).logits)
    assert not torch.equal(full.get_input_embeddings().weight, full.get_output_embeddings().weight)


def test_a_head_of_its_own_trains_under_lora(tmp_path):
    model = sm.craft(deep_model(), sm.SoftConfig(exits=(2, 4), tune="lora", lora=LORA, head="train"))
    before = model.lm_head.weight.detach().clone()
    stepped(model, 3)
    assert not torch.equal(model.lm_head.weight, before)
    sm.save(model, tmp_path / "delta")
    assert torch.equal(sm.load(tmp_path / "delta", base=deep_model())(pico_ids()).logits, model(pico_ids()).logits)


def test_masters_of_a_bfloat16_base_are_float32_and_settle_into_it():
    base = deep_model(dtype=torch.bfloat16)
    with pytest.raises(MethodError, match="float32"):
        sm.craft(base, sm.SoftConfig(exits=(2, 4)))
    model = sm.craft(base, sm.SoftConfig(exits=(2, 4), tune="lora", lora=LORA, head="train"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    stepped(model, 2)
    live = at_depth(model, 2)(pico_ids()).logits
    settled = sm.settle(model)
    assert {p.dtype for p in settled.parameters()} == {torch.bfloat16}
    assert (at_depth(settled, 2)(pico_ids()).logits - live).abs().max() <= 6e-2 * live.abs().max()


def test_exit_blocks_on_a_bfloat16_trunk_train_in_float32():
    model = sm.craft(deep_model(dtype=torch.bfloat16), sm.SoftConfig(exits=(2, 4), trunk="frozen"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    stepped(model, 2)
    settled = sm.settle(model)
    assert {p.dtype for p in settled.parameters()} == {torch.bfloat16}
    assert at_depth(settled, 2)(pico_ids()).logits.isfinite().all()


def test_qlora_where_a_quantised_base_can_be_made(tmp_path):
    pytest.importorskip("bitsandbytes")
    from sparsmith.crafting.base_model import load_base
    from sparsmith.recipe.schema import ModelSettings

    deep_model().save_pretrained(tmp_path / "base")
    try:
        base = load_base(ModelSettings(path=str(tmp_path / "base"), quant="nf4"))
        base(pico_ids())
    except Exception as fault:
        pytest.skip(f"4-bit products do not run here: {fault}")
    with pytest.raises(MethodError, match="qlora"):
        sm.craft(base, sm.SoftConfig(exits=(2, 4), tune="lora", lora=LORA))
    with pytest.raises(MethodError, match="nf4"):
        sm.craft(base, sm.SoftConfig(exits=(2, 4)))
    with pytest.raises(MethodError, match="without"):
        sm.craft(deep_model(), sm.SoftConfig(exits=(2, 4), tune="qlora", lora=LORA))
    model = sm.craft(base, sm.SoftConfig(exits=(2, 4), tune="qlora", lora=LORA))
    stepped(model, 2)
    live = at_depth(model, 2)(pico_ids()).logits.float()
    sm.save(model, tmp_path / "delta")
    assert torch.equal(at_depth(sm.load(tmp_path / "delta"), 2)(pico_ids()).logits.float(), live)
    settled = sm.settle(copy.deepcopy(model))
    assert (at_depth(settled, 2)(pico_ids()).logits.float() - live).abs().max() <= 0.1 * live.abs().max()
