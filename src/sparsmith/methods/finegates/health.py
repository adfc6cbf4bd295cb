"""Figures of the gates for the log and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import Gate, gates_of, state_of
from sparsmith.methods.finegates.size import expected_share, kept_share, tables_of
from sparsmith.ops.gates import SHIFT, gate_values

_CLOSED, _SOFT, _OPEN = range(3)
_BINS = 10


@torch.no_grad()
def read(model: nn.Module, config: FineGatesConfig) -> dict[str, Any]:
    """Flat: the share that remains, its aim, lambda, fractions of closed, soft and open gates, the share of gates that the task's
    gradient reaches, mean omega by kind. Nested: counts by layer, for the report."""
    state = state_of(model)
    if state is None:
        return {}
    counts = {kind: table.long() for kind, table in tables_of(model, _counts).items()}
    every = torch.cat([table.view(-1, 3) for table in counts.values()]).sum(0).double()
    shares = (every / every.sum()).tolist()
    found: dict[str, Any] = {"closed": shares[_CLOSED], "soft": shares[_SOFT], "open": shares[_OPEN]}
    settled = bool(next(iter(tables_of(model, lambda gate: gate.settled).values()))[0])
    if settled:
        found["remains"] = kept_share(model, config)
        found["table/scales"] = scale_histogram(model)
    elif config.learned and float(state.sigma) > 0:
        found["remains"] = float(expected_share(model, config, state.sigma))
        found["aim"], found["dual"] = float(state.aim), float(state.dual)
        alive = tables_of(model, _alive)
        found["reached"] = float(torch.cat([table.flatten() for table in alive.values()]).mean())
    for kind, table in tables_of(model, _level).items():
        found[f"mean/{kind}"] = float(table.mean())
    for kind, table in counts.items():
        found[f"table/{kind}"] = table.tolist()
    return found


@torch.no_grad()
def scale_histogram(model: nn.Module) -> list[tuple[float, float, int]]:
    """(low, high, count) of the kept gates' values in ten even bins; the last holds 1 itself."""
    values = torch.cat([gate.folded()[gate.kept].cpu() for _, gate in gates_of(model)])
    counts = torch.histc(values, bins=_BINS, min=0.0, max=1.0).long().tolist()
    return [(place / _BINS, (place + 1) / _BINS, count) for place, count in enumerate(counts)]


def words(metrics: Mapping[str, Any]) -> str:
    """`left 0.81 open 62%`."""
    if "open" not in metrics:
        return ""
    left = f"left {metrics['remains']:.3f} " if "remains" in metrics else ""
    return f"{left}open {metrics['open']:.0%}"


def _counts(gate: Gate) -> torch.Tensor:
    """(3,) closed, soft and open gates."""
    if bool(gate.settled):
        kept = gate.kept.sum()
        return torch.stack([gate.size - kept, kept.new_zeros(()), kept])
    value = gate_values(gate.logit)
    closed, opened = (value <= 0).sum(), (value >= 1).sum()
    return torch.stack([closed, gate.size - closed - opened, opened])


def _alive(gate: Gate) -> torch.Tensor:
    """(N,) 1 where the last draw lies inside the clamp, so that a gradient passes."""
    drawn = torch.tanh(gate.logit) + gate.noise + SHIFT
    return ((drawn > 0) & (drawn < 1)).float()


def _level(gate: Gate) -> torch.Tensor:
    return gate.folded().mean()
