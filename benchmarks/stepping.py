"""Optimiser steps of a crafted model, timed: what the tuning benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from sparsmith.crafting.apply import craft, trained_roles
from sparsmith.crafting.base_model import load_base, load_tokenizer
from sparsmith.data import Collator, load_data
from sparsmith.training import Objective


class Stepper:
    """A crafted model with its optimiser; a call runs the given batches and returns the seconds."""

    def __init__(self, recipe: Any, methods: Sequence[Any]) -> None:
        self.model = craft(load_base(recipe.model), list(methods), inplace=True, seed=0, proof=False).train()
        self.objective = Objective(self.model).train()
        self.parts = self.model.sparsmith.parts
        self.parameters = [p for role in trained_roles(self.model).values() for _, p in role]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def __call__(self, batches: list[dict[str, torch.Tensor]]) -> float:
        begun = time.perf_counter()
        for batch in batches:
            self.objective(**batch)["loss"].backward()
            for method, config in self.parts:
                method.after_forward(self.model, config)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - begun


def batches_of(recipe: Any, steps: int) -> list[dict[str, torch.Tensor]]:
    """The first batches of the recipe's own stream."""
    tokenizer = load_tokenizer(recipe.model)
    size = recipe.train.batch_size
    data = load_data(recipe.data, tokenizer, seed=0, rows_needed=steps * size)
    collate = Collator.of(recipe.data, tokenizer)
    return [collate([data.train[i] for i in range(s * size, (s + 1) * size)]) for s in range(steps)]


def interleaved(
    steppers: dict[str, Stepper], batches: list[dict[str, torch.Tensor]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every stepper and repeat, in turn forwards and backwards, so that a drift of the machine meets all alike."""
    for stepper in steppers.values():
        stepper(batches[:2])
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for repeat in range(repeats):
        order = list(steppers) if repeat % 2 == 0 else list(steppers)[::-1]
        for name in order:
            seconds[name].append(steppers[name](batches))
    return seconds
