"""From a budget to a depth: the deepest sub-model that costs no more than is asked.

A fraction counts products: (n F_layer + F_head) / (N F_layer + F_head), F_layer with its linears and its attention over the context (a
sliding block over its window). Milliseconds per token are read from a measured profile (`profile.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import anatomy
from sparsmith.anatomy.rows import base_config
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.errors import UsageError
from sparsmith.inference.faults import BudgetTooSmall
from sparsmith.inference.profile import Profile, find_profile

if TYPE_CHECKING:
    from torch import nn

    from sparsmith.anatomy import ModelShape


def layer_flops(config: Any, context: int) -> list[int]:
    """Forward FLOPs of each block for one token that sees `context` tokens, 2 per multiply-add."""
    shape, base = anatomy.shape_of(config), base_config(config)
    linear = _linears(shape)
    seen = [context] * shape.layers
    window, kinds = getattr(base, "sliding_window", None), getattr(base, "layer_types", None)
    if window and getattr(base, "use_sliding_window", True):
        slides = [kind == "sliding_attention" for kind in kinds] if kinds else [True] * shape.layers
        seen = [min(context, window) if slide else context for slide in slides]
    return [2 * own + 4 * length * shape.heads * shape.head_dim for own, length in zip(linear, seen, strict=True)]


def _linears(shape: ModelShape) -> list[int]:
    """Weights of the linears that one token uses, block by block."""
    attention = sum(i * o for i, o in shape.attention_linears.values())
    dense, sparse = sum(i * o for i, o in shape.ffn_linears.values()), shape.sparse
    mixed = sparse.active_params // len(sparse.blocks) if sparse and sparse.blocks else 0
    return [attention + (mixed if sparse and i in sparse.blocks else dense) for i in range(shape.layers)]


def head_flops(config: Any) -> int:
    """Forward FLOPs of the head for one token."""
    shape = anatomy.shape_of(config)
    return 2 * shape.vocab * shape.hidden


def depth_fractions(config: Any, depths: Sequence[int], context: int) -> dict[int, float]:
    """Depth -> its cost per token over the full model's, in (0, 1]."""
    layers, head = layer_flops(config, context), head_flops(config)
    whole = sum(layers) + head
    return {depth: (sum(layers[:depth]) + head) / whole for depth in depths}


def depth_fraction(model: nn.Module, depth: int, context: int) -> float:
    """As `depth_fractions`, for one depth, with the blocks that an exit puts behind it."""
    config: Any = model.config
    layers, head = layer_flops(config, context), head_flops(config)
    own = sum(layers[:depth]) + _extra_blocks(model, depth) * layers[min(depth, len(layers) - 1)]
    return (own + head) / (sum(layers) + head)


def traffic_fractions(shape: ModelShape, depths: Sequence[int]) -> dict[int, float]:
    """Depth -> weights read per decoded token over the full model's: what decides the speed of a batch of one."""
    layers, head = _linears(shape), shape.vocab * shape.hidden
    whole = sum(layers) + head
    return {depth: (sum(layers[:depth]) + head) / whole for depth in depths}


def depth_for(
    model: nn.Module, budget: float | str, *, context: int, batch: int = 1, profile: Profile | str | Path | None = None
) -> int:
    """The deepest depth that fits.

    Args:
        budget: a share of the full model's FLOPs per token, in (0, 1], or milliseconds per token as "12ms".
        context: tokens that a new token sees.
        batch: rows that run together; a profile holds for one batch size.
        profile: where milliseconds are read from: a profile, its file, or a folder that holds it.

    Raises:
        UsageError: neither a share nor milliseconds. BudgetTooSmall: names the cheapest depth. ProfileMissing: nothing was measured
        for this device, number type and batch size.
    """
    depths = depths_of(model)
    if isinstance(budget, str):
        limit, unit = _milliseconds(budget), "ms per token"
        costs = find_profile(profile, model, batch).ms_per_token
        costs = {depth: costs[depth] for depth in depths if depth in costs}
    else:
        limit, unit = float(budget), "of the full model's FLOPs per token"
        if not 0 < limit <= 1:
            raise UsageError("budget", f"{budget}", "a share in (0, 1], or milliseconds as `12ms`", "Mend the budget.")
        costs = {depth: depth_fraction(model, depth, context) for depth in depths}
    fitting = [depth for depth, cost in costs.items() if cost <= limit]
    if fitting:
        return max(fitting)
    cheapest = min(costs, key=lambda depth: costs[depth])
    raise BudgetTooSmall(
        "budget",
        f"{budget}",
        f"at least {_rounded_up(costs[cheapest])} {unit}, the cost of depth {cheapest}",
        "Raise the budget, or tune a shallower exit.",
    )


def _extra_blocks(model: nn.Module, depth: int) -> int:
    if depth not in depths_of(model):
        return 0
    return len(anatomy.blocks(at_depth(model, depth))) - depth


def _milliseconds(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*ms\s*", text)
    if found is None or float(found[1]) <= 0:
        raise UsageError("budget", f"`{text}`", "a share in (0, 1], or milliseconds as `12ms`", "Mend the budget.")
    return float(found[1])


def _rounded_up(cost: float) -> str:
    """Three decimals, never below the cost, so that the number can be given back as the budget."""
    return f"{int(cost * 1000 + 1) / 1000:.3f}"
