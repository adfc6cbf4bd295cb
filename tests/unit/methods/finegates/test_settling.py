"""Settling: hard gates, folded scales, exact merges with a LoRA, and the errors that stop what cannot work."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting.lora import lora_parameters
from sparsmith.errors import ScheduleTooShort, TargetUnreachable
from sparsmith.methods.finegates.gates import draw_noise, gates_of, linears_of
from sparsmith.methods.finegates.method import FINEGATES
from sparsmith.methods.finegates.paper_gates import paper_linears
from sparsmith.methods.finegates.size import kept_share
from tests.kit.cases import largest_difference, logits
from tests.kit.gates import LAYOUTS, gated, gates_config, scatter
from tests.kit.pico import pico_model

both = pytest.mark.parametrize("layout", LAYOUTS)


def with_lora(layout: str, dtype: torch.dtype = torch.float32, family: str = "llama", **settings):
    """A model with gates as after training and a LoRA that says something."""
    config = gates_config(layout, lora={"r": 4, "alpha": 8, "dropout": 0.0}, **settings)
    model = sm.craft(pico_model(family), config, inplace=True, seed=3).eval()
    scatter(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in lora_parameters(model):
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.to(dtype), config


@both
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
def test_merged_and_folded_is_the_live_model(layout, family):
    """Fault 4: the adapter lay outside the gates."""
    model, config = with_lora(layout, family=family)
    live = logits(FINEGATES.settle(copy.deepcopy(model), config))
    settled = sm.settle(model)
    assert largest_difference(live, logits(settled)) <= 1e-4
    assert not lora_parameters(settled) and not gates_of(settled)


@both
def test_gates_and_adapter_see_one_draw(layout):
    """Fault 4: base and adapter had noise of their own. The linear with its adapter is called once, with what the gates let through."""
    model, _ = with_lora(layout)
    draw_noise(model.train(), 0.3)
    wrappers = [one for _, one in paper_linears(model)] if layout == "paper" else linears_of(model)
    for wrapper in wrappers:
        inner = wrapper.linear
        assert hasattr(inner, "base_layer"), "the LoRA must lie inside"
        x = torch.randn(2, 3, inner.in_features)
        gate_C = wrapper.columns.values() if layout == "paper" else wrapper.input_gate()
        rows_R = wrapper.rows.values() if layout == "paper" else 1.0
        weight = inner.base_layer.weight + inner.get_delta_weight("default")
        wanted = rows_R * (x * gate_C @ weight.t())
        assert torch.allclose(wrapper(x), wanted, atol=1e-5)
        assert torch.equal(wrapper(x), wrapper(x))


@both
def test_no_gate_and_no_soft_scale_is_left(layout, tmp_path):
    """Fault 11: there was no way to a plain model. Nothing of a gate lies in any file."""
    from safetensors.torch import load_file

    settled = sm.settle(scatter(gated(layout)))
    sm.save(settled, tmp_path / "plain", full=True)
    names = [name for file in (tmp_path / "plain").glob("*.safetensors") for name in load_file(file)]
    plain = {n for n, _ in pico_model().named_parameters()}
    assert names and set(names) <= plain | {"lm_head.weight"}
    assert not any(word in name for name in names for word in ("logit", "scale", "kept", "noise", "gates"))


@pytest.mark.parametrize("survivors", ["reopen", "keep"])
def test_settled_gates_are_hard(survivors):
    """Fault 7: nothing made a soft gate hard. Closed is 0 and kept is 1, or its own scale where that was asked for; the size is met."""
    config = gates_config(target=0.7, settle={"survivors": survivors})
    model = scatter(gated(config))
    soft = {name: gate.folded() for name, gate in gates_of(model)}
    FINEGATES.settle(model, config)
    for name, gate in gates_of(model):
        value = gate.folded()
        assert not value[~gate.kept].any()
        wanted = torch.ones_like(value) if survivors == "reopen" else soft[name].clamp(min=0.01)
        assert torch.equal(value[gate.kept], wanted[gate.kept])
        assert torch.equal(gate.train().values(), gate.eval().values())
    assert kept_share(model, config) <= 0.7
    settled = sm.settle(copy.deepcopy(model))
    kept = sum(p.numel() for p in settled.model.layers.parameters() if p.ndim == 2)
    every = sum(p.numel() for p in pico_model().model.layers.parameters() if p.ndim == 2)
    assert kept / every == pytest.approx(kept_share(model, config), abs=1e-6)


@pytest.mark.parametrize("target", [0.9, 0.75, 0.5])
def test_the_target_is_a_share_of_parameters(target):
    """Fault 8: the number asked for was neither a share of gates nor of parameters."""
    config = gates_config(target=target, settle={"unit": 1})
    settled = sm.settle(scatter(gated(config)))
    kept = sum(p.numel() for p in settled.model.layers.parameters() if p.ndim == 2)
    every = sum(p.numel() for p in pico_model().model.layers.parameters() if p.ndim == 2)
    assert target - 2 * 3 * 64 / every < kept / every <= target


@both
def test_too_few_steps_are_refused_with_the_number(layout):
    config = gates_config(layout)
    with pytest.raises(ScheduleTooShort, match=r"at least (338|465) steps, or gates\.lr"):
        FINEGATES.on_step(gated(config), config, 0, 100)
    with pytest.raises(ScheduleTooShort):
        FINEGATES.check_steps(config, 100)
    FINEGATES.check_steps(config, 600)


def test_a_size_that_cannot_be_reached_is_refused_with_what_can():
    with pytest.raises(TargetUnreachable, match=r"between 0\.\d+ and 1\.000"):
        gated(gates_config(target=0.1, gates={"attention": "none"}))
