"""Pico models of the ten families that sparsmith knows: built from a config alone, random weights, no network.

2 blocks, hidden 64, vocabulary 128, 4 heads (2 key/value heads where the family groups them), FFN 96. `pico_model` hands out a fresh
deep copy each time, so a test may cut it up.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH = 64, 96, 2, 4, 2, 128, 128

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": KV_HEADS}
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _GROUPED,
    "phi3": _GROUPED,
    "gpt_neox": _COMMON,
    "gpt2": {
        "n_embd": HIDDEN,
        "n_inner": FFN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "vocab_size": VOCAB,
        "n_positions": LENGTH,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


def pico_config(family: str = "llama", **changes: Any):
    """The family's config at pico size; `changes` are set on top."""
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


@cache
def _built(family: str, seed: int, changes: str) -> PreTrainedModel:
    state = torch.get_rng_state()
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(pico_config(family, **json.loads(changes)), attn_implementation="eager")
    torch.set_rng_state(state)
    return model.eval()


def pico_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A fresh random model in eval mode, attention `eager`."""
    return copy.deepcopy(_built(family, seed, json.dumps(changes, sort_keys=True))).to(dtype)


def pico_ids(rows: int = 2, length: int = 12, *, seed: int = 0, low: int = 3) -> torch.Tensor:
    """(rows, length) random token ids, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, VOCAB, (rows, length), generator=generator)


def randomize_adapters(model: torch.nn.Module, std: float = 0.05, seed: int = 1) -> None:
    """Give every zero `up` of a PESC model random values, so that the experts differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pesc.up"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
