"""SoFT, alone and with PESC, on every family: from plan to settled checkpoint through the contract alone."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting.apply import check_roles, trained_roles
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.errors import MethodError
from tests.kit.cases import METHODS, base_for, trained_like
from tests.kit.pico import FAMILIES, pico_ids

BOTH = "pesc, soft LoRA"
NAMES = ("soft", "soft LoRA", "soft, frozen trunk", "heads of their own", "pesc, soft", "pesc, soft LoRA", "soft, pesc")


def logits(model):
    with torch.no_grad():
        return model(pico_ids(3, 20, seed=8), use_cache=False).logits


EVERY = [(family, name) for family in FAMILIES for name in NAMES]
FAST = [(family, name) for family, name in EVERY if name == BOTH or family in ("llama", "gpt2")]


@pytest.mark.parametrize("family, name", FAST)
def test_from_plan_to_checkpoints(family, name, tmp_path):
    holds(family, name, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family, name", [pair for pair in EVERY if pair not in FAST])
def test_the_other_pairs(family, name, tmp_path):
    holds(family, name, tmp_path)


def holds(family, name, tmp_path):
    """Neutral to the bit, counts of the plan, roles, delta and full form, settled."""
    config, base = METHODS[name], base_for(METHODS[name], family)
    plan, crafted = sm.plan(base.config, config), sm.craft(base, config)
    assert crafted.sparsmith.neutral["bitwise"] and torch.equal(logits(crafted), logits(base))
    counted = [p for parameter, p in crafted.named_parameters() if ".lora_" not in parameter]
    assert plan.total_params == sum(p.numel() for p in counted)
    assert plan.trained == check_roles(crafted)
    named = {parameter for tensors in trained_roles(crafted).values() for parameter, _ in tensors}
    assert named == {parameter for parameter, p in crafted.named_parameters() if p.requires_grad}

    model = trained_like(config, family)
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=base_for(config, family))
    assert depths_of(again) == depths_of(model) == (2, 4)
    settled = sm.settle(copy.deepcopy(model))
    if name in ("soft, frozen trunk", "heads of their own"):
        with pytest.raises(MethodError, match="export the depths"):
            sm.save(settled, tmp_path / "full", full=True)
        full = None
    else:
        sm.save(settled, tmp_path / "full", full=True)
        full = sm.load(tmp_path / "full")
    for depth in (2, 4):
        live = logits(at_depth(model, depth))
        assert torch.equal(logits(at_depth(again, depth)), live)
        assert (logits(at_depth(settled, depth)) - live).abs().max() <= 1e-5
        if full is not None:
            assert torch.equal(logits(at_depth(full, depth)), logits(at_depth(settled, depth)))
