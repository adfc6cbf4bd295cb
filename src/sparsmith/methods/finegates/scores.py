"""Scores of units that no gate has learned: the rivals', and the start that learning may be given.

magnitude    norm of a unit's column outward times the norm of its rows inward
flap_like    variance of the unit's input times the squared norm of its column, standardised over the layer (after FLAP,
             arXiv 2312.11983; without its bias, which stock classes have no place for)
random       a draw from the stream `finegates.random`

and the start of learned gates:

importance   sqrt(variance of the input * squared column norm * pull), pull = the gate's own squared task gradient, token by token: what a
             unit moves, and what the task feels of it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsmith.methods.finegates.gates import GatedLinear, Site
from sparsmith.seeds import torch_generator

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy

RANDOM = "finegates.random"


def plain_weight(linear: nn.Module) -> Tensor:
    """(outputs, inputs) float32 of a linear, a LoRA's base, a 4-bit one or a Conv1D."""
    linear = getattr(linear, "base_layer", linear)
    weight = linear.weight.detach()  # type: ignore[operator]
    if hasattr(weight, "quant_state"):
        import bitsandbytes.functional as bnb

        weight = bnb.dequantize_4bit(weight.data, weight.quant_state).reshape(weight.quant_state.shape)
    weight = weight.float()
    return weight.t() if type(linear).__name__ == "Conv1D" else weight


def movement(holder: GatedLinear, size: int) -> Tensor:
    """(size,) input RMS times column norm, summed over the channels of a gate: how much it moves the residual stream."""
    return (holder.input_rms() * plain_weight(holder.linear).norm(dim=0)).view(size, -1).sum(1)


def importance(site: Site, kind: str) -> Tensor:
    """(n,) larger = keep: the geometric mean of what a unit moves and of what the task feels of it, as watched while gates were open."""
    gate, holder = site.gate(kind), site.ffn if kind == "units" else site.attention
    assert gate is not None and holder is not None
    moved = (holder.input_variance() * plain_weight(holder.linear).square().sum(0)).view(gate.size, -1).sum(1)
    return (moved * gate.pull).sqrt()


def baseline_scores(name: str, site: Site, kind: str, row: Anatomy, seed: int, layer: int) -> Tensor:
    """(n,) larger = keep, of the gates of one kind in one block."""
    gate, holder = site.gate(kind), site.ffn if kind == "units" else site.attention
    assert gate is not None and holder is not None
    size = gate.size
    if name == "importance":
        return importance(site, kind)
    if name == "random":
        return torch.rand(size, generator=torch_generator(seed, f"{RANDOM}.{kind}", layer))
    columns = plain_weight(holder.linear).square().sum(0)
    if name == "magnitude":
        return columns.view(size, -1).sum(1).sqrt() * _inward_norms(site, kind, row, size)
    score = (holder.input_variance() * columns).view(size, -1).sum(1)
    return (score - score.mean()) / score.std().clamp(min=1e-12)


def _inward_norms(site: Site, kind: str, row: Anatomy, size: int) -> Tensor:
    """(size,) norm of the rows that make each gate's channels: of the up projection, or of the values."""
    parent, name = (site.ffn_places if kind == "units" else site.attention_places)[-2]
    rows = plain_weight(getattr(parent, name))
    if kind == "heads":  # each query head reads the values of its group
        return torch.ones(size)
    if kind == "units":
        return rows[-size:].norm(dim=1)
    assert site.attention is not None
    return rows[-size * site.attention.head_dim :].view(size, -1).norm(dim=1)
