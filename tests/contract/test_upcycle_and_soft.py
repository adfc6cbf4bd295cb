"""A depth-elastic mixture of experts: upcycled, then readable at every depth, from the plan to stock checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsmith as sm
from sparsmith.crafting.apply import check_roles, trained_roles
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.errors import MethodError
from sparsmith.methods.upcycle.layers import sparse_blocks
from sparsmith.training.objective import Objective
from tests.kit.depths import deep_model, labelled_batch
from tests.kit.pico import pico_ids

EXITS = (1, 2, 4)


def pair(**settings):
    moe = {**settings.pop("moe", {}), "freeze_dense": True}
    return [sm.UpcycleConfig(experts=4, moe=moe, **settings), sm.SoftConfig(exits=EXITS)]


def logits(model):
    with torch.no_grad():
        return model(pico_ids(3, 20, seed=8), use_cache=False).logits


def as_trained(family="llama", **settings):
    model = sm.craft(deep_model(family), pair(**settings)).eval()
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.03)
    return model


CASES = {
    "mixtral": ("llama", {}),
    "qwen2_moe from llama, every second": ("llama", {"layers": "every-2"}),
    "qwen2_moe": ("qwen2", {}),
    "qwen3_moe, a list": ("qwen3", {"layers": [1, 3]}),
    "flex_olmo": ("olmo2", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_trains(name):
    family, settings = CASES[name]
    base = deep_model(family)
    plan = sm.plan(base, pair(**settings))
    model = sm.craft(base, pair(**settings))
    assert check_roles(model) == plan.trained and {"router", "expert", "block", "norm"} <= set(plan.trained)
    assert plan.total_params == sum(p.numel() for p in model.parameters())
    seen = [id(p) for rows in trained_roles(model).values() for _, p in rows]
    assert len(seen) == len(set(seen)), "every tensor has one role"


@pytest.mark.parametrize("name", CASES)
def test_every_depth_is_a_stock_mixture(name, tmp_path):
    family, settings = CASES[name]
    model = as_trained(family, **settings)
    sparse = [index for index, _ in sparse_blocks(model)]
    sm.export(model, tmp_path / "out", depths="all", proof=False)
    for depth in EXITS:
        folder = tmp_path / "out" / f"depth-{depth}"
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == model.config.model_type and config["num_hidden_layers"] == depth
        stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        assert [index for index, _ in sparse_blocks(stock)] == [index for index in sparse if index < depth]
        wanted = logits(at_depth(model, depth))
        assert (logits(stock) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        again = sm.load(folder)
        assert depths_of(again) == tuple(n for n in EXITS if n <= depth)


def test_losses_of_depths_and_of_routers_train_together(tmp_path):
    model = as_trained()
    out = Objective(model.train())(**labelled_batch())
    assert {"upcycle.balance", "upcycle.router_z"} <= set(out["terms"])
    out["loss"].backward()
    for role, rows in trained_roles(model).items():
        assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in rows), role
    model.eval()
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=deep_model())
    assert torch.equal(logits(again), logits(model)) and depths_of(again) == EXITS


def test_generation_at_a_depth_is_the_slices_own():
    model = as_trained()
    ids = pico_ids(1, 6)
    shallow = sm.generate(model, ids, max_new_tokens=6, depth=2, do_sample=False)
    sliced = at_depth(model, 2).generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(getattr(shallow, "sequences", shallow)[:, :12], sliced[:, :12])


def test_a_mixture_that_is_there_becomes_elastic():
    settled = sm.settle(sm.craft(deep_model(), sm.UpcycleConfig(experts=4)))
    configs = [sm.UpcycleConfig(donor="sparse", moe={"freeze_dense": True}), sm.SoftConfig(exits=EXITS)]
    plan = sm.plan(settled.config, configs)
    model = sm.craft(settled, configs)
    assert check_roles(model) == plan.trained and depths_of(model) == EXITS


def test_parts_of_exits_of_their_own_are_refused():
    with pytest.raises(MethodError, match="upcycle"):
        sm.plan(deep_model(), [*pair()[:1], sm.SoftConfig(exits=EXITS, trunk="frozen")])


def test_experts_that_choose_go_alone():
    with pytest.raises(MethodError, match=r"soft.*experts that choose"):
        sm.plan(deep_model(), pair(moe={"router": "expert_choice"}))
