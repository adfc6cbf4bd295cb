"""Where the linears of a block are held, whatever stands around them."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy

Place = tuple[nn.Module, str]
"""Who holds a linear, and under which name."""


def places_of(block: nn.Module, row: Anatomy, part: str) -> tuple[Place, ...]:
    """Of the linears of a block's `ffn` or `attention`, the outward one last."""
    prefix, names = (row.ffn, row.ffn_linears) if part == "ffn" else (row.attention, row.attention_linears)
    return tuple(parent_of(block, f"{prefix}.{name}".lstrip(".")) for name in names)


def plain_linear(block: nn.Module, path: str) -> nn.Module:
    """The linear at `path` of a block, whatever has been put around it."""
    parent, name = parent_of(block, path)
    module: Any = getattr(parent, name)
    module = getattr(module, "linear", module)
    return getattr(module, "base_layer", module)


def parent_of(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Who holds the linear at `path`, inside what another method has put around the FFN, and under which name."""
    parent, _, name = path.rpartition(".")
    holder = anatomy.walk(block, parent) if parent else block
    return getattr(holder, "ffn", holder), name
