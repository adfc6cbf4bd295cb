"""What a cut buys and what gates cost: a uniformly cut model against the dense one, and a gated training step against a plain LoRA step.

    python -m benchmarks.finegates_speed [--repeats 15] [--hidden 1024] [--threads 2]

Part 1: a random Llama (float32) is cut to 60 % of its body by the method itself. Dense and cut model take turns in one process: prefill
of one prompt, and decode token by token with the cache. Predicted prefill: the ratio of FLOPs, counted by torch. Predicted decode: the
ratio of bytes that a token reads (weights of the blocks and of the head, and the cache). Bounds: 85 % of the first speed-up, 80 % of the
second.

Part 2: training steps on the recipe's rows (forward, backward, clipping, AdamW): gates in each phase with a LoRA, against the LoRA alone;
the figure is the median of the ratios, repeat by repeat. Bound: 1.25 while gates are learned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from benchmarks.stepping import Stepper, batches_of, interleaved
from sparsmith import craft, settle
from sparsmith.app import facts
from sparsmith.app.recipes import load_recipe
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import gates_of

PREFILL_BOUND, DECODE_BOUND, STEP_BOUND = 0.85, 0.80, 1.25
TARGET = 0.6


def pair(hidden: int) -> tuple[Any, Any]:
    """A random dense model and the same one cut to 60 % of its body by random gates."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=8,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=8192,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    dense = AutoModelForCausalLM.from_config(config).eval()
    gated = craft(dense, FineGatesConfig(target=TARGET, settle={"unit": 64}))
    with torch.no_grad():
        for name, gate in gates_of(gated):
            share = 0.75 if name.endswith("groups") else 1.0  # a quarter of the groups goes, the FFN gives the rest
            order = torch.randperm(gate.size)
            gate.logit[order[round(share * gate.size) :]] = -2.0
            gate.logit += 0.01 * torch.rand(gate.size)
    return dense, settle(gated).eval()


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> float:
    begun = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begun


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds per token after the prompt."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    begun = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - begun) / tokens


def flops(model: Any, ids: torch.Tensor) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def bytes_read(model: Any, context: int) -> int:
    """Per token: every weight but the embedding's rows (the tied head reads the whole table once), and the cache."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context * 4
    return weights + cache


def inference(hidden: int, context: int, tokens: int, repeats: int) -> dict[str, Any]:
    dense, slim = pair(hidden)
    ids = torch.randint(0, 8192, (1, context))
    times: dict[str, dict[str, list[float]]] = {kind: {"dense": [], "slim": []} for kind in ("prefill", "decode")}
    for repeat in range(repeats + 2):
        turn = (("dense", dense), ("slim", slim)) if repeat % 2 == 0 else (("slim", slim), ("dense", dense))
        for name, model in turn:
            own = {"prefill": prefill(model, ids), "decode": decode(model, ids[:, :64], tokens)}
            if repeat >= 2:
                for kind, seconds in own.items():
                    times[kind][name].append(seconds)
    ratios = {kind: [a / b for a, b in zip(rows["dense"], rows["slim"])] for kind, rows in times.items()}
    predicted = {
        "prefill": flops(dense, ids) / flops(slim, ids),
        "decode": bytes_read(dense, 64 + tokens // 2) / bytes_read(slim, 64 + tokens // 2),
    }
    measured = {kind: statistics.median(values) for kind, values in ratios.items()}
    body = [sum(p.numel() for p in m.model.layers.parameters()) for m in (dense, slim)]
    bounds = {"prefill": PREFILL_BOUND, "decode": DECODE_BOUND}
    return {
        "model": f"Llama, d {hidden}, 8 layers, FFN {dense.config.intermediate_size}, float32, batch 1, context {context}",
        "slim": f"FFN {slim.config.intermediate_size}, {slim.config.num_attention_heads} heads, {type(slim).__name__}",
        "body_remains": body[1] / body[0],
        "speed_up": measured,
        "predicted": predicted,
        "of_predicted": {kind: measured[kind] / predicted[kind] for kind in measured},
        "reached": {kind: measured[kind] >= bounds[kind] * predicted[kind] for kind in measured},
        "bounds": bounds,
        "seconds": times,
    }


class Gated(Stepper):
    """A stepper that is in one phase of the schedule."""

    def __init__(self, recipe: Any, methods: Any, step: int) -> None:
        super().__init__(recipe, methods)
        self.step = step

    def __call__(self, batches: list[dict[str, torch.Tensor]]) -> float:
        begun = time.perf_counter()
        for batch in batches:
            for method, config in self.parts:
                method.on_step(self.model, config, self.step, 1000)
            super().__call__([batch])
        return time.perf_counter() - begun


def training(recipe: Any, steps: int, repeats: int) -> dict[str, Any]:
    config = next(one for one in recipe.methods if isinstance(one, FineGatesConfig))
    batches = batches_of(recipe, steps)
    hold, late = round(1000 * config.schedule.hold), round(1000 * config.schedule.settle_at)
    steppers = {
        "lora": Stepper(recipe, [FineGatesConfig(baseline="lora", lora=config.lora)]),
        "gates, watching": Gated(recipe, [config], max(1, hold // 2)),
        "gates, learning": Gated(recipe, [config], (hold + late) // 2),
        "gates, recovering": Gated(recipe, [config], min(999, late + 1)),
    }
    seconds = interleaved(steppers, batches, repeats)
    ratios = {name: [own / plain for own, plain in zip(values, seconds["lora"])] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    reached = medians["gates, learning"] <= STEP_BOUND
    return {"bound": STEP_BOUND, "reached": reached, "step_over_lora": medians, "ratios": ratios, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/finegates-stories3m.yaml")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/finegates_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    record = {"command": facts.command(), "machine": facts.machine(), "versions": facts.versions()}
    record["threads"] = arguments.threads
    record["inference"] = found = inference(arguments.hidden, arguments.context, arguments.tokens, arguments.repeats)
    for kind in ("prefill", "decode"):
        print(
            f"{kind}: {found['speed_up'][kind]:.2f}x, predicted {found['predicted'][kind]:.2f}x, {found['of_predicted'][kind]:.0%}"
        )
    record["training"] = steps = training(
        load_recipe(arguments.recipe), arguments.steps, max(5, arguments.repeats // 2)
    )
    for name, ratio in steps["step_over_lora"].items():
        print(f"{name:>20}: {ratio:.3f} of the LoRA step")
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
