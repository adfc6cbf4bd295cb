"""What the paper layout's gates amount to: what they count as removed, what is really dead, and the fold into plain weights.

A row or column that is closed for one linear alone cannot be taken out of a stock model: the residual stream passes there. What can be
deleted, exactly, is a unit whose contribution is 0:

    FFN unit      a closed down column, up row or gate row makes it 0 (SiLU and GELU of 0 are 0): it lives if it is open in all of them
    KV group      every channel of every query head has a closed value row or a closed column outward

Closed query and key rows flatten a head's attention, they do not silence it. Counted and deletable are different figures: neither bounds
the other (README, fault 10).

Shapes: I FFN units, G key-value groups, Q query heads of a group, h channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy, ModelShape
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.families import Costs, attention_refusal, kept_groups_allowed
from sparsmith.methods.finegates.gates import Gate, sites
from sparsmith.methods.finegates.graft import graft
from sparsmith.methods.finegates.paper_gates import PaperLinear, paper_linears
from sparsmith.methods.finegates.places import parent_of
from sparsmith.methods.finegates.prune import fold_and_cut


@dataclass(frozen=True)
class Living:
    """Of one block, ascending: what gives the residual stream anything but 0."""

    units: tuple[int, ...]
    groups: tuple[int, ...]


@torch.no_grad()
def counted(model: nn.Module) -> tuple[int, int]:
    """(weights removed as the reference counts, weights of all gated linears): numel - open rows * open columns, soft = open."""
    removed, every = 0, 0
    for _, linear in paper_linears(model):
        opened = int(is_open(linear.rows).sum()) * int(is_open(linear.columns).sum())
        numel = linear.rows.size * linear.columns.size
        removed, every = removed + numel - opened, every + numel
    return removed, every


@torch.no_grad()
def living(model: nn.Module) -> list[Living]:
    """Of every block of a model with the paper's gates."""
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
    rests = _rests_at_zero(anatomy.base_of(model).config)
    return [Living(_units(block, shape, rests), _groups(block, row, shape)) for block in anatomy.blocks(model)]


def kept(blocks: list[Living], row: Anatomy, shape: ModelShape) -> list[Living]:
    """What a checkpoint of a stock class keeps: every block as wide as the widest, filled up with dead units."""
    width = max(1, max(len(block.units) for block in blocks))
    most = max(1, max(len(block.groups) for block in blocks))
    allowed = (shape.kv_heads,) if attention_refusal(row) else kept_groups_allowed(row, shape)
    groups = min(count for count in allowed if count >= most)
    return [Living(_filled(b.units, width, shape.ffn_width), _filled(b.groups, groups, shape.kv_heads)) for b in blocks]


def deletable(blocks: list[Living], row: Anatomy, shape: ModelShape) -> int:
    """Parameters that go when each block keeps these; biases of deleted units included."""
    costs = Costs.of(FineGatesConfig(), row, shape)
    group = costs.group + shape.heads // shape.kv_heads * costs.head
    gone = ((shape.ffn_width - len(b.units)) * costs.unit + (shape.kv_heads - len(b.groups)) * group for b in blocks)
    return round(sum(gone))


def fold(model: nn.Module) -> None:
    """W <- Diag(omega_r) W Diag(omega_c) and b <- omega_r b, in place, in float32 and rounded once; the wrappers go. Shapes stay."""
    shape = anatomy.shape_of(model)
    for block in anatomy.blocks(model):
        for path in shape.linears:
            parent, name = parent_of(block, path)
            wrapper = getattr(parent, name)
            if isinstance(wrapper, PaperLinear):
                _fold_one(wrapper)
                setattr(parent, name, wrapper.linear)
    base: Any = anatomy.base_of(model)
    base._modules.pop("finegates", None)


def fold_and_delete(model: nn.Module) -> nn.Module:
    """`fold`, then delete what is dead in a form that a stock class takes. The function is that of the gated model at test time."""
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
    stay = kept(living(model), row, shape)
    fold(model)
    if not deletable(stay, row, shape):
        return model
    settings = FineGatesConfig.model_validate(
        {"gates": {"attention": "none" if attention_refusal(row) else "kv_groups"}}
    )
    graft(model, settings, seed=0)  # the structured gates, closed by hand: one way to delete for both layouts
    for site, block in zip(sites(model), stay):
        for kind, indices in (("units", block.units), ("groups", block.groups)):
            gate = site.gate(kind)
            if gate is not None:
                mask = torch.zeros_like(gate.kept)
                mask[list(indices)] = True
                gate.settle(mask, reopen=True)
    return fold_and_cut(model)


def is_open(gate: Gate) -> Tensor:
    """(N,) bool: open or soft, that is mu > -1/2."""
    return gate.folded() > 0


def _filled(alive: tuple[int, ...], count: int, every: int) -> tuple[int, ...]:
    dead = [index for index in range(every) if index not in set(alive)]
    return tuple(sorted([*alive, *dead[: count - len(alive)]]))


def _gated(block: nn.Module, path: str) -> PaperLinear:
    parent, name = parent_of(block, path)
    return getattr(parent, name)


def _rests_at_zero(config: Any) -> bool:
    """True where the FFN's activation of 0 is 0."""
    names = (getattr(config, key, None) for key in ("hidden_act", "hidden_activation", "activation_function"))
    name = next(filter(None, names), None)
    return name is not None and ACT2FN[name](torch.zeros(1)).item() == 0


def _units(block: nn.Module, shape: ModelShape, rests: bool) -> tuple[int, ...]:
    *inward, outward = (_gated(block, path) for path in shape.ffn_linears)
    rows_KI = torch.cat([is_open(linear.rows).view(-1, shape.ffn_width) for linear in inward])
    rows_KI = rows_KI if rests else rows_KI[1:]  # the first goes through the activation
    alive = is_open(outward.columns) & rows_KI.all(0)
    return tuple(torch.nonzero(alive).flatten().tolist())


def _groups(block: nn.Module, row: Anatomy, shape: ModelShape) -> tuple[int, ...]:
    if attention_refusal(row):
        return tuple(range(shape.kv_heads))
    *inward, outward = (_gated(block, path) for path in shape.attention_linears)
    values_G1h = is_open(inward[-1].rows)[-shape.kv_heads * shape.head_dim :].view(shape.kv_heads, 1, shape.head_dim)
    columns_GQh = is_open(outward.columns).view(shape.kv_heads, -1, shape.head_dim)
    return tuple(torch.nonzero((values_G1h & columns_GQh).any(2).any(1)).flatten().tolist())


@torch.no_grad()
def _fold_one(wrapper: PaperLinear) -> None:
    linear: Any = wrapper.linear
    rows, columns = wrapper.rows.folded(), wrapper.columns.folded()
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    scale_RC = rows.to(wide)[:, None] * columns.to(wide)[None]
    scale = scale_RC.t() if type(linear).__name__ == "Conv1D" else scale_RC
    linear.weight = _plain((linear.weight.to(wide) * scale).to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias = _plain((linear.bias.to(wide) * rows.to(wide)).to(linear.bias.dtype))


def _plain(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
