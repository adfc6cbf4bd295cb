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


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """[start, stop) of the first dimension that this rank holds; a scalar or a whole tensor is all here.

    Raises:
        ValueError: a layout other than rows cut evenly over one mesh dimension (FSDP2's own).
    """
    length = tensor.shape[0] if tensor.dim() else 1
    if not is_sharded(tensor):
        return 0, length
    sharded: Any = tensor
    cut = [(dim, place) for dim, place in enumerate(sharded.placements) if place.is_shard()]
    if [place.dim for _, place in cut] not in ([], [0]):
        raise ValueError(f"a tensor laid out as {sharded.placements}: only rows over one mesh dimension are known here")
    if not cut:
        return 0, length
    dim = cut[0][0]
    chunk = -(-length // sharded.device_mesh.size(dim))
    start = min(sharded.device_mesh.get_local_rank(dim) * chunk, length)
    return start, min(start + chunk, length)


@torch.no_grad()
def take(target: Tensor, rows: Tensor) -> None:
    """Copy `rows`, which are those of `rows_of(target)`, into what this rank holds of `target`."""
    part(target).copy_(rows)


def like(rows: Tensor, tensor: Tensor) -> Tensor:
    """`rows` of this rank as a tensor that is sharded as `tensor` is."""
    from torch.distributed.tensor import DTensor

    sharded: Any = tensor
    rows = rows.to(sharded.to_local().device)
    return DTensor.from_local(
        rows, sharded.device_mesh, sharded.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def is_owner(tensor: Tensor) -> bool:
    """Whether this rank is the one that writes its rows: of several replicas of a shard, the first."""
    sharded: Any = tensor
    return all(
        place.is_shard() or sharded.device_mesh.get_local_rank(dim) == 0 for dim, place in enumerate(sharded.placements)
    )
