"""Health of the methods (router load, open gates, ...), gathered at the log steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sparsmith import ranks
from sparsmith.crafting.apply import trained_roles
from sparsmith.crafting.record import record_of
from sparsmith.ops.shards import whole


class Health(TrainerCallback):
    """Asks every method for its metrics and measures the gradient norm of every role.

    `words` is what the progress bar shows; `tables` holds the nested figures of the last window.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = record_of(model).parts
        self._roles: dict[str, list[nn.Parameter]] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self.words = ""
        self.tables: dict[str, dict[str, Any]] = {}
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not earlier: sharding has put other parameters in the place of those that were crafted
        self._roles = {role: [p for _, p in tensors] for role, tensors in trained_roles(self._model).items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for method, config in self._parts:
            method.on_step(self._model, config, state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if step == 1 or step % max(int(args.logging_steps), 1) == 0:
            for role, parameters in self._roles.items():
                grads = [p.grad for p in parameters if p.grad is not None]
                if grads:
                    self._gradients[role] = torch.nn.utils.get_total_norm(grads)

    def take(self) -> dict[str, float]:
        """Flat figures `<method>/<name>` and `gradient/<role>` since the last call."""
        flat = {f"gradient/{role}": whole(norm).item() for role, norm in self._gradients.items()}
        words = []
        for method, config in self._parts:
            metrics = method.metrics(self._model, config)
            words.append(method.health(metrics))
            self._warn(method.warnings(metrics))
            self.tables[method.name] = {
                name.removeprefix("table/"): value for name, value in metrics.items() if name.startswith("table/")
            }
            flat.update({f"{method.name}/{k}": float(v) for k, v in metrics.items() if not k.startswith("table/")})
        self.words = " ".join(filter(None, words))
        return flat

    def _warn(self, told: Mapping[str, str]) -> None:
        """Print what is told for the first time."""
        for key, sentence in told.items():
            if key not in self._warned and ranks.is_first():
                print(f"warning: {sentence}")
            self._warned.add(key)
