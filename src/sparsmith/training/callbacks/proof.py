"""Proof 2: every trained role moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sparsmith.crafting.apply import check_roles, trained_roles
from sparsmith.crafting.record import record_of
from sparsmith.errors import RoleDidNotMove
from sparsmith.ops.shards import is_sharded, part, squared_norms

# Elements watched per tensor: enough that a moving tensor cannot look still, little enough for tensors of any size.
_SAMPLE = 65_536


class RolesMove(TrainerCallback):
    """Before step 1 every wanted role holds a tensor; after `steps` optimiser steps every role has changed.

    Not earlier than after two steps: with U = 0, router and D get no gradient from the task loss in step 1 (PESC §1).
    `result` is the proof's record; `proven` is called with it as soon as it is there.
    """

    def __init__(self, model: nn.Module, steps: int, proven: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._model = model
        self._proven = proven
        self._steps = steps
        self._start: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self._start_step = self._still_until = 0
        self.counts: dict[str, int] = {}
        self.result: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts = check_roles(self._model)
        self._start_step = state.global_step
        parts = record_of(self._model).parts
        self._still_until = max((m.still_until(config, state.max_steps) for m, config in parts), default=0)
        self._start = {
            role: [(name, _sample(parameter).clone()) for name, parameter in tensors]
            for role, tensors in trained_roles(self._model).items()
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._start and state.global_step - max(self._start_step, self._still_until) >= self._steps:
            self._prove(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._start and state.global_step > self._start_step + 1:
            self._prove(state.global_step)

    def _prove(self, step: int) -> None:
        updates: dict[str, float] = {}
        still: list[str] = []
        for role, tensors in trained_roles(self._model).items():
            pairs = list(zip(tensors, self._start[role], strict=True))
            changes = [_sample(p).float() - before.float() for (_, p), (_, before) in pairs]
            squares = squared_norms(changes, sharded=any(is_sharded(p) for _, p in tensors))
            updates[role] = squares.sum().sqrt().item()
            still += [name for (name, _), square in zip(tensors, squares.tolist(), strict=True) if square == 0]
            if not updates[role] > 0:
                raise RoleDidNotMove(
                    f"role {role}",
                    f"an update of {updates[role]:g} after {step - self._start_step} steps",
                    "a change of its tensors",
                    "Look at its learning rate and whether a gradient reaches it.",
                )
        self._start = {}
        self.result = {
            "check": "every trained role moved",
            "step": step,
            "value": updates,
            "limit": 0.0,
            "tensors_still": still,
            "passed": True,
        }
        if self._proven is not None:
            self._proven(self.result)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    flat = part(parameter.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
