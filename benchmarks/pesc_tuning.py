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
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.stepping import Stepper, batches_of, interleaved
from sparsmith.app import facts
from sparsmith.app.recipes import load_recipe
from sparsmith.protocols.pesc import variant

CONTROLS = ("dense_lora", "single_adapter", "learned")


def measure(recipe: Any, repeats: int, steps: int) -> dict[str, Any]:
    """Seconds of every control and repeat, tokens of a repeat, ratios to the dense LoRA."""
    batches = batches_of(recipe, steps)
    steppers = {control: Stepper(recipe, variant(recipe, control, 0, Path("unused")).methods) for control in CONTROLS}
    seconds = interleaved(steppers, batches, repeats)
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
