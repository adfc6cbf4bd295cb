"""Models with gates for the tests of FineGates, and a plain loop that tunes them in seconds: the objective and the method's own calls,
without a Trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.crafting.record import record_of
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import gates_of
from sparsmith.training.objective import Objective
from tests.kit.pico import VOCAB, pico_model

LAYOUTS = ("structured", "paper")
BIASED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "gpt2": {},
}
"""Families without, with some and with all biases: name -> changes of the pico config."""


LEVEL: dict[str, Any] = {"start": "level", "init_mu": 0.52, "noise_sigma": 0.1, "reg_sigma": (0.5, 0.25), "lr": 1e-2}
SCHEDULE = {"hold": 0.05, "warmup": 0.20, "settle_at": 0.70}
"""The plain stochastic gates, written out: all start alike, with noise. What wins in practice may be other settings."""


def gates_config(layout: str = "structured", **settings: Any) -> FineGatesConfig:
    """Settings of a layout; of learned structured gates `LEVEL` and `SCHEDULE` lie below what is given."""
    given = dict(settings)
    learned = layout == "structured" and "baseline" not in settings
    if learned:
        given["schedule"] = {**SCHEDULE, **settings.get("schedule", {})}
    gates = LEVEL if learned else {"lr": LEVEL["lr"]}
    given["gates"] = {**gates, **settings.get("gates", {})}
    return FineGatesConfig.model_validate({"layout": layout, **given})


def still(layout: str) -> dict[str, Any]:
    """Settings without noise."""
    return {"gates": {"noise_sigma": 0.0}} if layout == "structured" else {"paper": {"noise_sigma": 0.0}}


def gated(config: FineGatesConfig | str = "structured", family: str = "llama", seed: int = 3, **changes: Any) -> Any:
    """A crafted pico model in evaluation mode."""
    config = gates_config(config) if isinstance(config, str) else config
    return sm.craft(pico_model(family, **changes), config, inplace=True, seed=seed).eval()


@torch.no_grad()
def scatter(model: Any, mean: float = 0.3, spread: float = 0.8, seed: int = 5) -> Any:
    """Gates as after training: closed, soft and open ones."""
    generator = torch.Generator().manual_seed(seed)
    for _, gate in gates_of(model):
        gate.logit.copy_(mean + spread * torch.randn(gate.size, generator=generator))
    return model


@torch.no_grad()
def put(gate: Any, mu: float | Tensor) -> None:
    """Set a gate's mu."""
    gate.logit.copy_(torch.atanh(torch.as_tensor(mu, dtype=torch.float64)).float().expand_as(gate.logit))


def copying(rows: int = 4, length: int = 12, vocab: int = VOCAB, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Endless batches of a toy task: the second half of a row repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        half = torch.randint(3, vocab, (rows, length // 2), generator=generator)
        ids = torch.cat([half, half], 1)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        yield {"input_ids": ids, "labels": labels}


def steps_of(
    model: Any,
    total: int,
    batches: Iterator[dict[str, Tensor]],
    *,
    stop: int | None = None,
    rate: float = 1e-3,
    seen: Callable[[int, dict[str, Any]], None] | None = None,
) -> Any:
    """Tune a crafted model for the first `stop` of `total` steps; `seen(step, output of the objective)` after each backward."""
    objective = Objective(model)
    parts = record_of(model).parts
    rates = {role: own for method, config in parts for role, own in method.rates(config).items()}
    groups = [
        {"params": [p for _, p in tensors], "lr": rates.get(role, rate)}
        for role, tensors in trained_roles(model).items()
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    objective.train()
    for step in range(total if stop is None else stop):
        for method, config in parts:
            method.on_step(model, config, step, total)
        out = objective(**next(batches))
        out["loss"].backward()
        for method, config in parts:
            method.after_forward(model, config)
        if seen is not None:
            seen(step, out)
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


TOY_VOCAB = 12


def table_rows(rows: int = 16, length: int = 12, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Endless batches of a toy task that an FFN must learn: each token is a fixed random function of the two before it."""
    table = torch.randint(3, 3 + TOY_VOCAB, (TOY_VOCAB, TOY_VOCAB), generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, 3 + TOY_VOCAB, (rows, 2), generator=generator)
        while ids.shape[1] < length:
            following = table[ids[:, -2] - 3, ids[:, -1] - 3]
            noise = torch.randint(3, 3 + TOY_VOCAB, (rows,), generator=generator)
            keep = torch.rand(rows, generator=generator) < 0.7  # else a row falls into a short circle
            ids = torch.cat([ids, torch.where(keep, following, noise)[:, None]], 1)
        labels = ids.clone()
        labels[:, :2] = -100
        yield {"input_ids": ids, "labels": labels}


@cache
def _toy(width: int, steps: int) -> Any:
    model = pico_model(num_hidden_layers=1, intermediate_size=width).train()
    optimiser, batches = torch.optim.AdamW(model.parameters(), lr=4e-3), table_rows(seed=1)
    for _ in range(steps):
        model(**next(batches)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def toy_model(width: int = 48, steps: int = 400) -> Any:
    """A pico model of one block, tuned on `table_rows`, so that its units do something."""
    return copy.deepcopy(_toy(width, steps))


@torch.no_grad()
def toy_loss(model: Any, batches: int = 8) -> float:
    """Mean loss on rows that were not trained on."""
    rows = table_rows(seed=99)
    return sum(model.eval()(**next(rows)).loss.item() for _ in range(batches)) / batches
