"""Batches of rows of like length, and a model that is put in evaluation mode and left as it was.

Shape letters: B rows, S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BATCH_TOKENS = 4096
"""Tokens of one forward, padding included."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[torch.device]:
    """No gradients, every module in eval mode; each module's own mode is put back. Gives the model's device."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, mode in modes:
            module.training = mode


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches, longest first, so that a batch too large for memory shows at once; ties keep their order."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False, device: torch.device | None = None) -> Tensor:
    """(B, S) int64, S = the longest row."""
    width = max(map(len, rows))
    filled = [
        [value] * (width - len(row)) + list(row) if left else [*row, *[value] * (width - len(row))] for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def pad_mask(rows: Sequence[Sequence[int]], *, left: bool = False, device: torch.device | None = None) -> Tensor:
    """(B, S) int64, 1 = a token, 0 = padding."""
    return pad([[1] * len(row) for row in rows], 0, left=left, device=device)


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward has `position_ids` (or passes any keyword on)."""
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
