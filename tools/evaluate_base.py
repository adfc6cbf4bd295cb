"""Measure the embedded base on text it never saw, against two baselines, and write its model card from the figures.

Bits per character on the held-out documents of each domain (`base_data.is_held_out`), less those whose wording recurs
in training (`base_data.unseen`), for the base as it ships
(bfloat16 weights, computed in float32), for an untrained twin (same configuration, random weights), and for a byte
bigram with add-one smoothing, fitted on the training text of the same domain. All three also pay for the end of text.

    python tools/evaluate_base.py --run build/base
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import base_card
import base_data
import numpy as np
import torch
from base_loop import bits_per_char
from train_base import DEFAULT_DATA
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BOUNDARY = 256  # the 257th symbol of the bigram: begin and end of a document


def _symbols(text: str) -> np.ndarray:
    """(bytes + 2,) ids with the boundary on both sides."""
    inner = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    return np.concatenate([[BOUNDARY], inner, [BOUNDARY]])


def bigram_bits_per_char(train: list[str], held_out: list[str]) -> float:
    """Bits per character of a byte bigram with add-one smoothing; each document's end is predicted too."""
    size = BOUNDARY + 1
    counts = np.zeros(size * size, dtype=np.int64)
    for text in train:
        symbols = _symbols(text)
        counts += np.bincount(symbols[:-1] * size + symbols[1:], minlength=size * size)
    smoothed = counts.reshape(size, size) + 1
    bits = -np.log2(smoothed / smoothed.sum(axis=1, keepdims=True))
    total = sum(bits[symbols[:-1], symbols[1:]].sum() for symbols in map(_symbols, held_out))
    return float(total / sum(map(len, held_out)))


Documents = dict[str, list[str]]


def measure(base: Path, train: Documents, held_out: Documents, seed: int) -> dict[str, dict[str, float]]:
    """Bits per character: {model: {domain: value}}."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    trained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    untrained = LlamaForCausalLM(AutoConfig.from_pretrained(base)).float().eval()
    return {
        "base": {d: bits_per_char(trained, tokenizer, held_out[d]) for d in base_data.DOMAINS},
        "untrained_twin": {d: bits_per_char(untrained, tokenizer, held_out[d]) for d in base_data.DOMAINS},
        "byte_bigram": {d: bigram_bits_per_char(train[d], held_out[d]) for d in base_data.DOMAINS},
    }


def sizes(train: Documents, held_out: Documents, clean: Documents) -> dict[str, dict[str, int]]:
    return {
        domain: {
            "train_documents": len(train[domain]),
            "train_characters": sum(map(len, train[domain])),
            "held_out_documents": len(held_out[domain]),
            "measured_documents": len(clean[domain]),
            "measured_characters": sum(map(len, clean[domain])),
        }
        for domain in base_data.DOMAINS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the training, for its steps, tokens and time"
    )
    parser.add_argument("--base", type=Path, default=ROOT / "src/sparsmith/embedded/base")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/base.json")
    parser.add_argument("--command", default="python tools/train_base.py train --out build/base --minutes 74 --compile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the untrained twin")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train, held_out = base_data.load(arguments.data)
    clean = {domain: base_data.unseen(train[domain], held_out[domain]) for domain in base_data.DOMAINS}
    payload = torch.load(arguments.run / "checkpoint.pt", weights_only=True)
    weights = sum(t.numel() for name, t in payload["model"].items() if name != "lm_head.weight")  # tied, counted once
    figures = {
        "what": "held-out bits per character of the embedded base; lower is better",
        "machine": "2-core x86-64 CPU, one thread, float32",
        "command": arguments.command,
        "weights": weights,
        "training": {k: payload["state"][k] for k in ("step", "tokens", "seconds", "tokens_available")},
        "data": sizes(train, held_out, clean),
        "bits_per_char": {
            model: {domain: round(value, 4) for domain, value in row.items()}
            for model, row in measure(arguments.base, train, clean, arguments.seed).items()
        },
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    (arguments.base / "README.md").write_text(base_card.render(figures))
    print(json.dumps(figures["bits_per_char"], indent=2))


if __name__ == "__main__":
    main()
