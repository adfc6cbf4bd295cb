"""Pico mixtures whose experts choose, and the loop that they are held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import sparsmith as sm
from tests.kit.pico import pico_ids, pico_model

DONORS = ("llama", "qwen2", "qwen3", "olmo2")


def choosing_config(experts: int = 4, **moe: Any) -> sm.UpcycleConfig:
    return sm.UpcycleConfig(experts=experts, moe={"router": "expert_choice", **moe})


def choosing_model(
    family: str = "llama", *, apart: float = 0.0, loud: float = 1.0, router: float = 1.0, **moe: Any
) -> Any:
    """A crafted model. `apart`: noise on the experts, relative to their size; `loud`, `router`: factors on what the experts give and on the
    routers' weights."""
    model = sm.craft(pico_model(family), choosing_config(**moe))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, ffn in model.sparse_blocks():
            ffn.gate.weight.mul_(router)
            for weight in ffn.experts.parameters():
                weight += apart * weight.std() * torch.randn(weight.shape, generator=generator)
            ffn.experts.down_proj.mul_(loud)
    return model


def fitted(model: Any, batches: int = 2) -> Any:
    """The model in evaluation, with thresholds of a few batches."""
    model.train()
    with torch.no_grad():
        for seed in range(batches):
            model(input_ids=pico_ids(4, 24, seed=100 + seed))
    model.route_context.settle_thresholds()
    return model.eval()


def naive_takers(p_TE: Tensor, mask_BS: Tensor, factor: float) -> list[set[int]]:
    """Of each token the experts that take it, by loops: C = ceil(factor * n / E) best tokens of a row for each expert."""
    rows, length = mask_BS.shape
    experts = p_TE.shape[1]
    takers: list[set[int]] = [set() for _ in range(rows * length)]
    for row in range(rows):
        own = [row * length + s for s in range(length) if mask_BS[row, s]]
        for expert in range(experts):
            best = sorted(own, key=lambda t: (-p_TE[t, expert].item(), t))
            for t in best[: math.ceil(factor * len(own) / experts)]:
                takers[t].add(expert)
    return takers


def naive_block(ffn: Any, x_BSD: Tensor, takers: list[set[int]], p_TE: Tensor) -> Tensor:
    """One token and one expert at a time."""
    x_TD, out = x_BSD.reshape(-1, x_BSD.shape[-1]), []
    for t, x in enumerate(x_TD):
        chosen = sorted(takers[t]) or [int(p_TE[t].argmax())]
        total = sum(p_TE[t, e] for e in chosen)
        y = torch.zeros_like(x)
        for e in chosen:
            gate, up = (ffn.experts.gate_up_proj[e] @ x).chunk(2)
            y = y + p_TE[t, e] / total * (ffn.experts.down_proj[e] @ (functional.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view_as(x_BSD)
