"""Save, load and settle know the methods by their contract alone: a fifth one, and a composition, go through."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting.base_model import load_base
from sparsmith.errors import CheckpointMismatch, MethodError
from sparsmith.methods import registry
from sparsmith.recipe.schema import ModelSettings
from tests.kit.checkpoints import LORA, save_base, train_a_little
from tests.kit.fifth import SHIFT, ShiftConfig, ShiftMethod
from tests.kit.pico import pico_ids


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture(autouse=True)
def registered():
    registry.register(SHIFT)
    yield
    registry.unregister("shift")


def crafted(base, *configs):
    model = train_a_little(sm.craft(load_base(ModelSettings(path=str(base))), list(configs), inplace=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".shift"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def test_a_fifth_method_round_trips(base, tmp_path):
    model = crafted(base, ShiftConfig())
    sm.save(model, tmp_path / "delta")
    assert not (tmp_path / "delta" / "adapter_config.json").exists()
    assert torch.equal(sm.load(tmp_path / "delta")(pico_ids()).logits, model(pico_ids()).logits)


def test_a_composition_round_trips_with_its_lora(base, tmp_path):
    model = crafted(base, ShiftConfig(), sm.PescConfig(num_experts=2, adapter_dim=8, lora=LORA))
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta")
    assert torch.equal(again(pico_ids()).logits, model(pico_ids()).logits)
    assert [config.method for config in again.sparsmith.configs] == ["shift", "pesc"]
    swapped = sm.craft(
        load_base(ModelSettings(path=str(base))),
        [sm.PescConfig(num_experts=2, adapter_dim=8, lora=LORA), ShiftConfig()],
    )
    from sparsmith.crafting.delta import fill_delta

    with pytest.raises(CheckpointMismatch):
        fill_delta(swapped, tmp_path / "delta")


def test_a_structure_that_no_class_has_is_not_written_as_stock(base, tmp_path):
    with pytest.raises(MethodError, match="standalone_sources"):
        sm.save(crafted(base, ShiftConfig()), tmp_path / "full", full=True)
    assert not (tmp_path / "full").exists()


def test_a_method_that_settles_into_a_stock_class_exports_as_stock(base, tmp_path, monkeypatch):
    """FFN + shift folds into the bias-free model only where the shift is dropped; what matters here is who is asked."""

    def settle(self: Any, model: Any, config: Any) -> Any:
        for block in model.model.layers:
            block.mlp = block.mlp.ffn
        return model

    monkeypatch.setattr(ShiftMethod, "settle", settle)
    sm.save(crafted(base, ShiftConfig()), tmp_path / "full", full=True)
    assert type(sm.load(tmp_path / "full")).__name__ == "LlamaForCausalLM"


def test_a_state_that_hands_out_copies_is_found(base, tmp_path, monkeypatch):
    sm.save(crafted(base, ShiftConfig()), tmp_path / "delta")
    real = ShiftMethod.state
    monkeypatch.setattr(ShiftMethod, "state", lambda s, m, c: {n: t.clone() for n, t in real(s, m, c).items()})
    with pytest.raises(MethodError, match="did not take"):
        sm.load(tmp_path / "delta")


def test_two_methods_with_one_tensor_are_found(base, tmp_path, monkeypatch):
    model = crafted(base, ShiftConfig(), sm.PescConfig(num_experts=2, adapter_dim=8))
    name = "base.model.layers.0.mlp.pesc.up"
    monkeypatch.setattr(ShiftMethod, "state", lambda s, m, c: {name: m.get_parameter(name)})
    with pytest.raises(MethodError, match="twice"):
        sm.save(model, tmp_path / "delta")
