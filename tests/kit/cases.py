"""Crafted models for the trials of promises 10 to 14: every method with its controls and switches, on every family.

A later method joins by rows of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import sparsmith as sm
from sparsmith.methods.base import LoraSettings, MethodConfig
from tests.kit.pico import FAMILIES, pico_ids, pico_model

LORA = LoraSettings(r=4, alpha=8, dropout=0.1)
NO_LORA = LoraSettings(enabled=False)
_PESC: dict[str, Any] = {"num_experts": 4, "top_k": 2, "adapter_dim": 16, "lora": LORA}

METHODS: dict[str, MethodConfig] = {
    "pesc": sm.PescConfig(**_PESC),
    "pesc without LoRA": sm.PescConfig(**{**_PESC, "lora": NO_LORA}),
    "pesc, top 1": sm.PescConfig(**{**_PESC, "top_k": 1}),
    "pesc, every second block": sm.PescConfig(**_PESC, layers="every-2"),
    "pesc, masked": sm.PescConfig(**_PESC, path="masked", route_early=True),
    "pesc, grouped": sm.PescConfig(**_PESC, path="grouped", adapter_activation="silu"),
    "pesc, loop": sm.PescConfig(**_PESC, path="loop", router_z_coef=0.01),
    "pesc, random router": sm.PescConfig(**_PESC, router="random"),
    "pesc, hash router": sm.PescConfig(**_PESC, router="hash"),
    "pesc, all experts": sm.PescConfig(**{**_PESC, "top_k": 4}, router="dense"),
    "pesc, frozen router": sm.PescConfig(**_PESC, router_trainable=False),
    "single adapter": sm.PescConfig(**_PESC, control="single_adapter"),
    "dense LoRA": sm.PescConfig(**_PESC, control="dense_lora"),
    "equal LoRA": sm.PescConfig(**_PESC, control="equal_lora"),
}
FEW_METHODS = ("pesc", "single adapter", "dense LoRA")
FEW_FAMILIES = ("llama", "gemma2", "gpt2")


def cases(
    methods: tuple[str, ...] = tuple(METHODS), families: tuple[str, ...] = tuple(FAMILIES)
) -> Iterator[tuple[str, MethodConfig, str]]:
    """(what, config, family) of every pair."""
    for family in families:
        for name in methods:
            try:
                yield f"{name} on {family}", METHODS[name], family
            except KeyError:
                raise AssertionError(f"no such case: {name}") from None


def few() -> Iterator[tuple[str, MethodConfig, str]]:
    """Enough pairs for a fast test."""
    return cases(FEW_METHODS, FEW_FAMILIES)


def probes() -> dict[str, dict[str, torch.Tensor]]:
    """Inputs with which two models are compared: plain rows, rows padded on either side, one token, rows packed into one."""
    ids = pico_ids(3, 20, seed=7)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 13:], left[2, :9] = 0, 0
    packed = torch.cat([torch.arange(9), torch.arange(11)])[None].expand_as(ids).contiguous()
    return {
        "plain": {"input_ids": ids},
        "padded right": {"input_ids": ids, "attention_mask": right},
        "padded left": {"input_ids": ids, "attention_mask": left},
        "one token": {"input_ids": ids[:1, :1]},
        "packed": {"input_ids": ids, "position_ids": packed},
    }


@torch.no_grad()
def logits(model: Any) -> dict[str, torch.Tensor]:
    """Logits of every probe, in evaluation mode; of padded rows only where there is a token."""
    was_training = model.training
    model.eval()
    found = {}
    for name, inputs in probes().items():
        out = model(**inputs, use_cache=False).logits
        mask = inputs.get("attention_mask")
        found[name] = out if mask is None else out[mask.bool()]
    model.train(was_training)
    return found


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def trained_like(config: MethodConfig, family: str, seed: int = 3) -> Any:
    """A crafted model whose zero-initialised parts are random, as after training."""
    model = sm.craft(pico_model(family), config, inplace=True, seed=seed, proof=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()
