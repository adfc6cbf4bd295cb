"""A tiny random SwitchTransformers with the character tokenizer, rows for it, and a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.kit.evalsets import char_tokenizer

START = 0
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": START,
    "dropout_rate": 0.0,
    "initializer_factor": 0.3,
}
MOE: dict[str, Any] = {"router": "top1", "combine": "switch"}


def switch_model(seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode. Blocks 0-1 are the encoder's, 2-5 the decoder's; sparse are 1, 3 and 5."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**{**_SIZES, **changes}))
    torch.set_rng_state(state)
    return model.eval()


def t5_model(seed: int = 0, **changes: Any) -> Any:
    """The dense twin, of the same sizes, in eval mode."""
    sizes = {key: value for key, value in _SIZES.items() if "sparse" not in key and key != "num_experts"}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**{**sizes, **changes}))
    torch.set_rng_state(state)
    return model.eval()


def save_t5(folder: Path) -> Path:
    """A dense checkpoint with a tokenizer."""
    t5_model().save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


def save_switch(folder: Path, **changes: Any) -> Path:
    """A checkpoint with a tokenizer."""
    switch_model(**changes).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


def switch_rows(*lengths: tuple[int, int], seed: int = 3) -> list[dict[str, Any]]:
    """Rows of (tokens read, tokens written), as the training stream gives them."""
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for number, (read, written) in enumerate(lengths):
        ids = torch.randint(4, 80, (read + written,), generator=stream)
        labels = torch.where(torch.arange(read + written) < read, -100, ids)
        rows.append({"input_ids": ids, "labels": labels, "domain": torch.zeros_like(ids), "sample_ids": number})
    return rows


def _lines(count: int, seed: int) -> str:
    stream = random.Random(seed)
    rows = []
    for _ in range(count):
        letter = stream.choice("abcd")
        text = f"say {letter}" + "xyz"[: stream.randrange(4)]
        rows.append({"prompt": text, "completion": letter})
    return "\n".join(map(json.dumps, rows)) + "\n"


def make_switch_recipe(folder: Path, moe: dict[str, Any] | None = None, **train: Any) -> Path:
    """Base, rows and a recipe; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        save_switch(folder / "base")
    (folder / "rows.jsonl").write_text(_lines(120, 1), encoding="utf-8")
    (folder / "held.jsonl").write_text(_lines(24, 2), encoding="utf-8")
    source = {"domain": "letters"}
    recipe = {
        "model": {"path": "base", "task": "seq2seq"},
        "methods": [{"method": "upcycle", "donor": "sparse", "moe": {**MOE, **(moe or {})}}],
        "data": {
            "train": [{**source, "name": "rows", "path": "rows.jsonl"}],
            "eval": [
                {
                    **source,
                    "name": "held",
                    "path": "held.jsonl",
                    "options": list("abcd"),
                    "metrics": ["loss", "rank", "exact_match"],
                }
            ],
            "max_length": 32,
            "workers": 1,
            "cache": str(folder / "cache"),
        },
        "train": {
            "steps": 12,
            "batch_size": 16,
            "micro_batch_size": 8,
            "learning_rate": 1e-2,
            "log_every": 4,
            "threads": 1,
            **train,
        },
        "proof": {"moved_after": 3},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
