"""A whole run small enough to be killed a hundred times, with everything switched on that a resume could get wrong: a pico base with a
tokenizer, two data sets, packing, a mixture with rates, dropout, gradient accumulation, a schedule, evaluation, saves.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.kit.checkpoints import save_base
from tests.kit.evalsets import char_tokenizer

STEPS, SAVE_EVERY = 12, 5
METHODS: dict[str, dict[str, Any]] = {
    "pesc": {
        "method": "pesc",
        "num_experts": 4,
        "top_k": 2,
        "adapter_dim": 8,
        "adapter_dropout": 0.1,
        "router_z_coef": 0.001,
        "lora": {"r": 4, "dropout": 0.1},
    },
    # noise on the router's input, dropout in the experts, and slots that are dropped by the draws of both
    "upcycle": {
        "method": "upcycle",
        "experts": 4,
        "moe": {"jitter": 0.05, "expert_dropout": 0.1, "capacity_factor": 1.0, "second_expert_drop": True},
    },
    # draws of exits and of blocks, and a LoRA's dropout: three streams that a resume could get wrong
    "soft": {
        "method": "soft",
        "exits": [1, 2],
        "schedule": "sampled",
        "layer_dropout": 0.3,
        "tune": "lora",
        "lora": {"r": 4, "dropout": 0.1},
        "guard": {"max_loss_gap": 9.0},
    },
    # thresholds that every micro-batch moves; jitter and dropout are streams
    "expert choice": {
        "method": "upcycle",
        "experts": 4,
        "moe": {"router": "expert_choice", "jitter": 0.05, "expert_dropout": 0.1, "ec": {"ema": 0.9}},
    },
}
"""A later method joins every trial by an entry here."""


def make_recipe(folder: Path, method: str = "pesc", **train: Any) -> Path:
    """Write base, rows and recipe into `folder` and return the recipe's path. `train` goes on top of its training settings."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.is_dir():
        save_base(base)
        char_tokenizer().save_pretrained(base)
        for index, name in enumerate(("sums", "words")):
            (folder / f"{name}.jsonl").write_text(row_lines(name, 80, seed=index), encoding="utf-8")
    sources = [
        {"name": n, "domain": n, "path": f"{n}.jsonl", "heldout": 0.1, "part": "train"} for n in ("sums", "words")
    ]
    sources[0]["rate"] = 2.0
    held = [
        {"name": f"{n}_held", "domain": n, "path": f"{n}.jsonl", "heldout": 0.1, "part": "heldout", "limit": 4}
        for n in ("sums", "words")
    ]
    recipe = {
        "model": {"path": "base", "dtype": "float32"},
        "methods": [METHODS[method]],
        "data": {
            "train": sources,
            "eval": held,
            "template": "{prompt}",
            "max_length": 64,
            "packing": True,
            "mixing": "rates",
            "workers": 1,
            "cache": str(folder / "cache"),
        },
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 5.0e-3,
            "schedule": "cosine",
            "save_every": SAVE_EVERY,
            "eval_every": 8,
            "log_every": 1,
            "threads": 1,
            **train,
        },
        "proof": {"moved_after": 3},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def row_lines(kind: str, count: int, seed: int) -> str:
    stream = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = stream.randrange(50), stream.randrange(50)
        word = "".join(stream.choice("abcdef") for _ in range(stream.randrange(2, 7)))
        pair = (f"{a}+{b}=", str(a + b)) if kind == "sums" else (f"reverse {word}: ", word[::-1])
        lines.append(json.dumps(dict(zip(("prompt", "completion"), pair))))
    return "\n".join(lines) + "\n"
