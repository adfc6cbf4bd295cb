"""PESC on every family, path and number type: crafting leaves the function unchanged to the bit (spec test 1)."""

import pytest
import torch

from sparsmith.methods.base import CraftContext
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.methods.pesc.method import PESC
from tests.kit.pico import FAMILIES, pico_ids, pico_model

KINDS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("path", ["auto", "masked", "grouped", "loop"])
@pytest.mark.parametrize("dtype", KINDS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_crafting_is_neutral(family, dtype, path):
    model, ids = pico_model(family, dtype=dtype), pico_ids(3, 20)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        crafted = PESC.craft(model, PescConfig(num_experts=4, adapter_dim=16, path=path), CraftContext())
        assert torch.equal(crafted(input_ids=ids).logits, before)
    assert not crafted.training
    assert {p.dtype for n, p in crafted.named_parameters() if ".pesc." in n} == {torch.float32}
    assert {p.dtype for n, p in crafted.named_parameters() if ".pesc." not in n} == {dtype}


@pytest.mark.parametrize("settings", [{"router": "random"}, {"router": "hash"}, {"router": "dense"}, {"top_k": 1}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_router_is_neutral(family, settings):
    model, ids = pico_model(family), pico_ids(3, 20)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        crafted = PESC.craft(model, PescConfig(num_experts=4, adapter_dim=16, **settings), CraftContext())
        assert torch.equal(crafted(input_ids=ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_rms_only_where_the_ffn_reads_the_residual(family):
    model = PESC.craft(pico_model(family), PescConfig(num_experts=4, adapter_dim=16), CraftContext())
    assert model.settings.router_input_norm == ("rms" if family == "olmo2" else "none")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_tensor_gets_a_gradient(family):
    config = PescConfig(num_experts=4, adapter_dim=16, balance_alpha=0.1)
    model = PESC.craft(pico_model(family), config, CraftContext()).train()
    ids = pico_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for role, tensors in PESC.roles(model, config).items():
        for name, parameter in tensors:
            assert parameter.grad is not None, (role, name)
            if name.endswith(("up", "router.weight")):
                assert parameter.grad.abs().max() > 0, (role, name)
