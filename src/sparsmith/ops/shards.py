"""Tensors of which each rank holds a part (FSDP2's DTensor). On one process, and under DDP, every tensor is whole already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part."""
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. Of a sharded one every rank must ask, in the same order."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds, sharing its memory; the first dimension may be 0."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def squared_norms(tensors: list[Tensor], sharded: bool) -> Tensor:
    """(N,) float32: the squared norm of each; where `sharded`, the tensors are this rank's parts and the sums are over all ranks."""
    sums = torch.stack([tensor.float().square().sum() for tensor in tensors])
    if sharded:
        distributed.all_reduce(sums)
    return sums
