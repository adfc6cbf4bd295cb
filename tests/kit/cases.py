"""Crafted models for the trials of promises 10 to 14: every method with its controls and switches, on every family.

A later method joins by rows of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import sparsmith as sm
from sparsmith.methods.base import LoraSettings, MethodConfig
from tests.kit.depths import changes_of
from tests.kit.pico import FAMILIES, pico_config, pico_ids, pico_model

LORA = LoraSettings(r=4, alpha=8, dropout=0.1)
NO_LORA = LoraSettings(enabled=False)
_PESC: dict[str, Any] = {"num_experts": 4, "top_k": 2, "adapter_dim": 16, "lora": LORA}

_SOFT: dict[str, Any] = {"exits": (2, 4)}
_UPCYCLE: dict[str, Any] = {"experts": 4}
_NOISE: dict[str, Any] = {"jitter": 0.05, "expert_dropout": 0.1, "capacity_factor": 1.0, "second_expert_drop": True}
_GATES: dict[str, Any] = {"gates": {"lr": 0.2}}
_WITHOUT = sm.PescConfig(**{**_PESC, "lora": NO_LORA})

Configs = MethodConfig | tuple[MethodConfig, ...]

METHODS: dict[str, Configs] = {
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
    "finegates": sm.FineGatesConfig(**_GATES, lora=LORA),
    "finegates without LoRA": sm.FineGatesConfig(**_GATES),
    "finegates, every kind": sm.FineGatesConfig(
        gates={"attention": "kv_groups+q_heads", "blocks": True, "lr": 0.2}, lora=LORA
    ),
    "finegates, level": sm.FineGatesConfig(gates={"start": "level", "noise_sigma": 0.1, "polarise": 0.1, "lr": 0.5}),
    "magnitude": sm.FineGatesConfig(baseline="magnitude", **_GATES, lora=LORA),
    "dense LoRA, gates": sm.FineGatesConfig(baseline="lora", lora=LORA),
    "soft": sm.SoftConfig(**_SOFT),
    "soft, sandwich": sm.SoftConfig(**_SOFT, schedule="sandwich", weights="linear"),
    "soft, sampled": sm.SoftConfig(**_SOFT, schedule="sampled"),
    "soft, rotational": sm.SoftConfig(**_SOFT, schedule="rotational", rotation=2),
    "soft, KL": sm.SoftConfig(**_SOFT, kl={"weight": 0.5}, ce={"impl": "checkpoint", "chunk": 8}),
    "soft, layer dropout": sm.SoftConfig(**_SOFT, layer_dropout=0.2),
    "soft LoRA": sm.SoftConfig(**_SOFT, tune="lora", lora=LORA),
    "soft, frozen trunk": sm.SoftConfig(**_SOFT, trunk="frozen"),
    "soft, frozen trunk, sandwich": sm.SoftConfig(**_SOFT, trunk="frozen", schedule="sandwich"),
    "sft": sm.SoftConfig(**_SOFT, arm="sft"),
    "heads of their own": sm.SoftConfig(**_SOFT, arm="ict"),
    "pesc, soft": (_WITHOUT, sm.SoftConfig(**_SOFT)),
    "pesc, soft LoRA": (sm.PescConfig(**_PESC), sm.SoftConfig(**_SOFT, tune="lora", lora=LORA)),
    "finegates, soft": (sm.FineGatesConfig(**_GATES), sm.SoftConfig(**_SOFT)),
    "finegates, soft LoRA": (sm.FineGatesConfig(**_GATES, lora=LORA), sm.SoftConfig(**_SOFT, tune="lora", lora=LORA)),
    "soft, pesc": (sm.SoftConfig(**_SOFT), _WITHOUT),
    "upcycle": sm.UpcycleConfig(**_UPCYCLE),
    "upcycle, top 1": sm.UpcycleConfig(**_UPCYCLE, top_k=1, moe={"router": "top1"}),
    "upcycle, lora": sm.UpcycleConfig(**_UPCYCLE, tune="lora", lora={"r": 4, "alpha": 8, "dropout": 0.0}),
    "upcycle, every second block": sm.UpcycleConfig(**_UPCYCLE, layers="every-2"),
    "upcycle, noise and capacity": sm.UpcycleConfig(**_UPCYCLE, moe=_NOISE),
}
_DONORS = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
TAKES: dict[str, tuple[str, ...]] = {
    **{name: _DONORS for name in METHODS if name.startswith("upcycle")},
    "upcycle, every second block": _DONORS[:-1],
}
"""Method -> the families that it takes, where these are not all; it refuses the others by name."""
FEW_METHODS = ("pesc", "single adapter", "dense LoRA", "finegates", "soft LoRA", "soft, frozen trunk", "upcycle, lora")
FEW_FAMILIES = ("llama", "gemma2", "gpt2")


def _changes(config: Configs, family: str) -> dict[str, Any]:
    """A method that works on the depth gets four blocks, the others two."""
    parts = config if isinstance(config, tuple) else (config,)
    return changes_of(family) if any(isinstance(one, sm.SoftConfig) for one in parts) else {}


def base_for(config: Configs, family: str, **options: Any) -> Any:
    """A fresh base for a case."""
    return pico_model(family, **_changes(config, family), **options)


def base_config_for(config: Configs, family: str) -> Any:
    return pico_config(family, **_changes(config, family))


def cases(
    methods: tuple[str, ...] = tuple(METHODS), families: tuple[str, ...] = tuple(FAMILIES)
) -> Iterator[tuple[str, Configs, str]]:
    """(what, config, family) of every pair that there is."""
    for family in families:
        for name in methods:
            assert name in METHODS, f"no such case: {name}"
            if family in TAKES.get(name, families):
                yield f"{name} on {family}", METHODS[name], family


def few() -> Iterator[tuple[str, Configs, str]]:
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


def trained_like(config: Configs, family: str, seed: int = 3) -> Any:
    """A crafted model whose zero-initialised parts are random, as after training."""
    model = sm.craft(base_for(config, family), config, inplace=True, seed=seed, proof=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()
