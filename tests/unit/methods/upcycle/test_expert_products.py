"""Which function computes the experts: ours while a plain mixture trains on a CPU, the library's everywhere else."""

from __future__ import annotations

import pytest
import torch

import sparsmith as sm
from sparsmith.methods.upcycle import expert_products
from sparsmith.methods.upcycle.layers import context_of, sparse_blocks
from tests.kit.pico import pico_ids, pico_model

IDS = pico_ids()


def crafted(**moe):
    return sm.craft(pico_model(), sm.UpcycleConfig(experts=4, moe=moe), proof=False)


@pytest.fixture
def calls(monkeypatch):
    """Tokens of every call of our function."""
    seen, function = [], expert_products.gated_experts

    def counted(x, *others):
        seen.append(len(x))
        return function(x, *others)

    monkeypatch.setattr(expert_products, "gated_experts", counted)
    return seen


def test_ours_runs_in_training_alone(calls):
    model = crafted()
    blocks = len(sparse_blocks(model))
    model.train()(input_ids=IDS)
    assert calls == [IDS.numel()] * blocks
    model.eval()(input_ids=IDS)
    assert len(calls) == blocks


@pytest.mark.parametrize("moe", [{"experts_impl": "eager"}, {"expert_dropout": 0.5}])
def test_what_asks_for_another_gets_it(calls, moe):
    crafted(**moe).train()(input_ids=IDS)
    assert not calls


def test_autocast_is_left_to_the_library(calls):
    with torch.autocast("cpu", torch.bfloat16):
        crafted().train()(input_ids=IDS)
    assert not calls


def test_loss_and_gradients_are_those_of_the_library(calls):
    found = []
    for way in ("grouped_mm", "eager"):
        model = crafted(experts_impl=way).train()
        with torch.no_grad():  # experts that differ, so that routers have a gradient
            for _, ffn in sparse_blocks(model):
                torch.manual_seed(1)
                ffn.experts.down_proj.mul_(1 + 0.1 * torch.randn_like(ffn.experts.down_proj))
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        context_of(model).clear()
    assert calls and found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        # the same sums in another order: float32 rounding, relative to the largest entry
        assert (grad - found[1][name]).abs().max() <= 1e-5 * found[1][name].abs().max(), name


def test_a_settled_model_names_the_library_s_function():
    model = crafted()
    assert model.config._experts_implementation == expert_products.GROUPED
    settled = sm.settle(model)
    assert settled.config._experts_implementation == "grouped_mm"
