"""Pico models of four blocks, for methods that work on the depth, and the same model built shallower by hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.kit.pico import FAMILIES, VOCAB, pico_config, pico_ids, pico_model

LAYERS = 4
_KINDS = ["sliding_attention", "full_attention"]
_STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HYBRID = ("gemma2", "gemma3_text")
"""Families of sliding and full attention in turn: the first full block is the second."""


def changes_of(family: str, layers: int = LAYERS) -> dict[str, Any]:
    """What makes a pico config one of `layers` blocks, without dropout."""
    depth = {"n_layer": layers, **_STILL} if family == "gpt2" else {"num_hidden_layers": layers}
    if family in HYBRID:
        depth["layer_types"] = [_KINDS[index % 2] for index in range(layers)]
    return depth


def deep_model(family: str = "llama", *, layers: int = LAYERS, **options: Any) -> Any:
    """A fresh pico model with `layers` blocks."""
    return pico_model(family, **{**changes_of(family, layers), **options})


def exits_for(family: str) -> tuple[int, ...]:
    """Every depth that the four-block model of this family may be read out at."""
    return (2, 3, 4) if family in HYBRID else (1, 2, 3, 4)


def shallow(model: Any, family: str, depth: int, **options: Any) -> Any:
    """The stock model of the first `depth` blocks with the same weights, built from its own config."""
    config = pico_config(family, **{**changes_of(family, depth), **options})
    small = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(model.dtype)
    known = model.state_dict()
    small.load_state_dict({name: known[name].clone() for name in small.state_dict()})
    return small.eval()


def labelled_batch(rows: int = 3, length: int = 14, *, seed: int = 5, padded: bool = True) -> dict[str, torch.Tensor]:
    """Rows whose first four tokens are a prompt without loss; the last row is padded on the right."""
    ids = pico_ids(rows, length, seed=seed)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4] = -100
    if padded:
        labels[-1, 9:], mask[-1, 9:] = -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


__all__ = [
    "FAMILIES",
    "HYBRID",
    "LAYERS",
    "VOCAB",
    "changes_of",
    "deep_model",
    "exits_for",
    "labelled_batch",
    "shallow",
]
