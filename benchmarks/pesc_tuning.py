"""Tuning throughput of PESC against the dense LoRA with the same LoRA settings, on the rows of a recipe.

    python -m benchmarks.pesc_tuning [--recipe recipes/pesc-three-domains.yaml] [--repeats 5] [--steps 10]

Both models are built once; then `repeats` times each in turn runs `steps` optimiser steps over the same batches (forward,
backward, clipping, AdamW), so that a drift of the machine meets both alike. The figure is the median of the ratios, repeat by
repeat. Target: >= 0.80.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from sparsmith.app import facts
from sparsmith.app.recipes import load_recipe
from sparsmith.crafting.apply import craft, trained_roles
from sparsmith.crafting.base_model import load_base, load_tokenizer
from sparsmith.data import Collator, load_data
from sparsmith.protocols.pesc import variant
from sparsmith.training import Objective

CONTROLS = ("dense_lora", "single_adapter", "learned")


class Stepper:
    """A crafted model with its optimiser; a call runs the given batches."""

    def __init__(self, recipe: Any, control: str) -> None:
        one = variant(recipe, control, 0, Path("unused"))
        self.model = craft(load_base(recipe.model), list(one.methods), inplace=True, seed=0, proof=False).train()
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


def measure(recipe: Any, repeats: int, steps: int) -> dict[str, Any]:
    """Seconds of every control and repeat, tokens of a repeat, ratios to the dense LoRA."""
    tokenizer = load_tokenizer(recipe.model)
    size = recipe.train.batch_size
    data = load_data(recipe.data, tokenizer, seed=0, rows_needed=steps * size)
    collate = Collator.of(recipe.data, tokenizer)
    batches = [collate([data.train[i] for i in range(s * size, (s + 1) * size)]) for s in range(steps)]
    steppers = {control: Stepper(recipe, control) for control in CONTROLS}
    for stepper in steppers.values():
        stepper(batches[:2])
    seconds: dict[str, list[float]] = {control: [] for control in CONTROLS}
    for repeat in range(repeats):
        order = CONTROLS if repeat % 2 == 0 else CONTROLS[::-1]
        for control in order:
            seconds[control].append(steppers[control](batches))
    tokens = int(sum(batch["token_mask"].sum() for batch in batches))
    ratios = {
        control: [dense / own for dense, own in zip(seconds["dense_lora"], seconds[control], strict=True)]
        for control in CONTROLS
    }
    return {
        "tokens_per_repeat": tokens,
        "seconds": seconds,
        "tokens_per_second": {control: tokens / statistics.median(values) for control, values in seconds.items()},
        "throughput_against_dense_lora": {control: statistics.median(values) for control, values in ratios.items()},
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/pesc-three-domains.yaml")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/pesc_tuning.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    result = measure(load_recipe(arguments.recipe), arguments.repeats, arguments.steps)
    target = {"learned against dense_lora": 0.80, "reached": result["throughput_against_dense_lora"]["learned"] >= 0.80}
    record = {"command": facts.command(), "machine": facts.machine(), "versions": facts.versions(), "target": target}
    for control, ratio in result["throughput_against_dense_lora"].items():
        print(f"{control:>15}: {result['tokens_per_second'][control]:8.0f} tokens/s, {ratio:.3f} of dense LoRA")
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**record, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
