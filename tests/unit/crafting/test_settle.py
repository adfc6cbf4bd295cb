"""Spec 5, test 14: merging keeps the function, on an NF4 base too, and never lands on another base."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import sparsmith as sm
from sparsmith.anatomy.four_bit import quantised_linears
from sparsmith.crafting import settle as settling
from sparsmith.crafting.settle import settle_report
from sparsmith.errors import CheckpointMismatch, MethodError, ProofError
from tests.kit.checkpoints import LORA, crafted, save_base, train_a_little
from tests.kit.pico import pico_ids

NF4_WARNINGS = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # bitsandbytes on a CPU


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


def quantised(base, **changes):
    pytest.importorskip("bitsandbytes")
    from sparsmith.crafting.base_model import load_base
    from sparsmith.recipe.schema import ModelSettings

    dense = load_base(ModelSettings(path=str(base), quant="nf4", **changes))
    return sm.craft(dense, sm.PescConfig(num_experts=2, top_k=1, adapter_dim=8, lora=LORA), inplace=True)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_merged_equals_unmerged(base, dtype, limit):
    model = crafted(base)
    for parameter in model.base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    before = model(pico_ids()).logits
    settled = sm.settle(model)
    assert settled is model and not [n for n, _ in model.named_parameters() if "lora" in n]
    assert (model(pico_ids()).logits - before).abs().max() <= limit
    report = settle_report(model)
    assert len(report.merged) == 14 and report.dequantised == 0
    errors = [row.relative_error for row in report.merged]
    assert max(errors) <= {torch.bfloat16: 4e-3}.get(dtype, 1e-6) and (dtype != torch.bfloat16 or max(errors) > 1e-4)
    assert all(row.lora_share > 0.01 for row in report.merged)
    assert report.merge.max_logit_difference <= limit and 0 <= abs(report.merge.mean_kl) < 1e-3
    assert settled is sm.settle(settled)


def test_a_convolution_of_gpt2_merges_the_right_way_round(tmp_path):
    model = crafted(save_base(tmp_path / "gpt2", "gpt2"))
    before = model(pico_ids()).logits
    assert (sm.settle(model)(pico_ids()).logits - before).abs().max() < 1e-5


@NF4_WARNINGS
def test_a_delta_over_nf4_comes_back_where_linears_have_biases(tmp_path):
    """The library casts a packed linear's bias in its first forward; the base is held against what it was when the delta was saved."""
    base = save_base(tmp_path / "qwen2", "qwen2")
    model = train_a_little(quantised(base, dtype="float32"))
    before = model(pico_ids()).logits
    sm.save(model, tmp_path / "delta")
    assert torch.equal(sm.load(tmp_path / "delta")(pico_ids()).logits, before)


@NF4_WARNINGS
def test_nf4_quantise_craft_train_save_load_merge(base, tmp_path):
    model = train_a_little(quantised(base)).train()
    assert len(quantised_linears(model)) == 14
    loss = model(input_ids=pico_ids(), labels=pico_ids()).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and p.dtype == torch.float32 for p in trained.values()
    )
    assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    model.zero_grad()

    model.eval()
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta")
    assert torch.equal(again(pico_ids()).logits, model(pico_ids()).logits)
    with pytest.raises(CheckpointMismatch, match="rounding errors"):
        sm.load(tmp_path / "delta", base=sm.load_base(sm_settings(base)))

    reference = copy.deepcopy(model)
    settling.dequantise(reference, torch.float32)
    unmerged = reference(pico_ids()).logits
    with pytest.raises(MethodError, match="rounding errors"):
        sm.settle(model, onto="original")
    merged = sm.settle(model)
    assert (merged(pico_ids()).logits - unmerged).abs().max() <= 1e-4
    report = settle_report(merged)
    assert report.dequantised == 14 and len(report.merged) == 14
    assert report.dequantise.max_logit_difference > report.merge.max_logit_difference
    assert all(math.isfinite(row.relative_error) for row in report.merged)
    assert not quantised_linears(merged) and not hasattr(merged.config, "quantization_config")

    sm.save(merged, tmp_path / "full", full=True)
    opened = sm.load(tmp_path / "full")
    assert torch.equal(opened(pico_ids()).logits, merged(pico_ids()).logits)


@NF4_WARNINGS
def test_the_merge_is_onto_the_quantised_weights_not_the_original_ones(base):
    """The reference adds the LoRA to the original weights: another function, by far more than rounding."""
    model = train_a_little(quantised(base))
    original = {
        name: linear.weight
        for name, linear in sm.load_base(sm_settings(base)).named_modules()
        if isinstance(linear, torch.nn.Linear)
    }
    merged = sm.settle(model)
    for name, linear in merged.base.named_modules():
        if name.endswith("q_proj"):
            gap = (linear.weight - original[name]).norm() / original[name].norm()
            assert gap > 0.05


def sm_settings(base):
    from sparsmith.recipe.schema import ModelSettings

    return ModelSettings(path=str(base))


def test_a_merge_that_changes_the_function_is_stopped(base, monkeypatch):
    model = crafted(base)
    real = settling._merge_one

    def wrong(name, layer, linear):
        layer.scaling["default"] *= 1.5
        return real(name, layer, linear)

    monkeypatch.setattr(settling, "_merge_one", wrong)
    with pytest.raises(ProofError, match="merged"):
        sm.settle(model)


def test_a_lora_of_another_kind_is_left_to_peft(base):
    from peft.tuners.lora import LoraLayer

    model = crafted(base)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.lora_bias["default"] = True
    with pytest.raises(MethodError, match="plain LoRA"):
        sm.settle(model)
