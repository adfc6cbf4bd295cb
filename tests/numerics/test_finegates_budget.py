"""The budget holds the size, and learned gates find planted redundancy.

Settings are written out: `dual.lr` 0.1, with which 600 steps are enough for the dual variable not to wind up.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsmith as sm
from sparsmith.methods.finegates.choose import choose
from sparsmith.methods.finegates.gates import sites
from sparsmith.methods.finegates.method import FINEGATES
from sparsmith.methods.finegates.size import kept_share
from tests.kit.gates import gates_config, steps_of, table_rows, toy_model

SETTLE_AT = 420
"""Of 600 steps, as the schedule's default has it."""


def learned(base, config):
    """Tuned up to the settling; (model, the last figures before it)."""
    model, last = sm.craft(base, config, seed=1), {}

    def seen(step, out):
        if step == SETTLE_AT - 1:
            last.update(FINEGATES.metrics(model, config))

    return steps_of(model, 600, table_rows(), stop=SETTLE_AT + 1, seen=seen), last


@pytest.mark.parametrize("target", [0.8])
def test_the_size_is_held_and_never_overrun(target):
    config = gates_config(target=target, dual={"lr": 0.1}, settle={"unit": 1})
    model, last = learned(toy_model(), config)
    assert abs(last["remains"] - target) <= 0.02
    unit = 3 * 64 / (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 48)  # one FFN channel of the only block
    assert target - unit < kept_share(model, config) <= target
    settled = sm.settle(copy.deepcopy(model))
    body = sum(p.numel() for p in settled.model.layers.parameters() if p.ndim == 2)
    assert body / sum(p.numel() for p in toy_model().model.layers.parameters() if p.ndim == 2) == pytest.approx(
        kept_share(model, config), abs=1e-6
    )


@torch.no_grad()
def widened(seed: int = 0):
    """The toy model with as many units again, whose columns outward are 0; the planted units' indices."""
    model = toy_model()
    mlp = model.model.layers[0].mlp
    width, generator = mlp.up_proj.out_features, torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * width, generator=generator)
    for name in ("gate_proj", "up_proj"):
        old = getattr(mlp, name).weight
        more = old[torch.randperm(width, generator=generator)] + 0.1 * torch.randn(old.shape, generator=generator)
        setattr(mlp, name, _linear(torch.cat([old, more])[order]))
    mlp.down_proj = _linear(torch.cat([mlp.down_proj.weight, torch.zeros_like(mlp.down_proj.weight)], 1)[:, order])
    mlp.intermediate_size = model.config.intermediate_size = 2 * width
    return model, set(torch.nonzero(order >= width).flatten().tolist())


def _linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.contiguous())
    return linear


def half_of_the_ffn(**settings):
    attention, ffn = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96
    target = (attention + ffn / 2) / (attention + ffn) + 1e-6
    return gates_config(target=target, settle={"unit": 1}, **{"gates": {"attention": "none"}, **settings})


def planted_share(kept: tuple[int, ...], planted: set[int]) -> float:
    """Of the removed units."""
    removed = set(range(2 * len(planted))) - set(kept)
    assert len(removed) == len(planted)
    return len(removed & planted) / len(removed)


def test_planted_units_are_the_ones_that_go():
    model, planted = widened()
    assert torch.allclose(
        model(torch.arange(3, 9)[None]).logits, toy_model()(torch.arange(3, 9)[None]).logits, atol=1e-5
    )
    tuned, _ = learned(model, half_of_the_ffn(dual={"lr": 0.1}))
    kept = torch.nonzero(sites(tuned)[0].gate("units").kept).flatten().tolist()
    assert planted_share(tuple(kept), planted) >= 0.9


def test_random_does_not_find_them():
    model, planted = widened()
    config = half_of_the_ffn(baseline="random")
    crafted = sm.craft(model, config, seed=1)
    shares = [planted_share(choose(crafted, config, seed).units[0], planted) for seed in range(12)]
    assert all(0.3 <= share <= 0.7 for share in shares) and abs(sum(shares) / len(shares) - 0.5) <= 0.1
