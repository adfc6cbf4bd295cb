"""Speed: of models side by side, and of the ways in which one elastic model can write.

Everything is measured in turn within each repeat, so that a machine that slows down slows all of them alike; the median of the repeats
counts, with the quartiles beside it. The first repeat is warm-up.

Decode is the time of `new_tokens` + 1 tokens less that of one, over `new_tokens`; prefill is the time to the first token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith.evaluating.batching import evaluation_mode
from sparsmith.inference import ExitStats, SpeculationStats, generate


@dataclass(frozen=True)
class Timing:
    """A median with its first and third quartile."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        first, _, third = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return cls(statistics.median(values), first, third)


@dataclass(frozen=True)
class Speed:
    """One model."""

    prefill_tokens_per_second: Timing
    """Of one prompt."""
    ms_per_token: dict[int, Timing]
    """Rows that run together -> milliseconds per step of all of them."""


def measure_speed(
    models: Mapping[str, Any], *, batches: Sequence[int], context: int, new_tokens: int, repeats: int
) -> dict[str, Speed]:
    """Prefill and decode of every model, greedy, by transformers' generate, on prompts of `context` random tokens."""
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in batches} for name in models}
    for batch in batches:
        for repeat in range(repeats + 1):
            for name, model in models.items():
                ids = _random_ids(model, batch, context)
                first, whole = _seconds(model, ids, 1), _seconds(model, ids, new_tokens + 1)
                if repeat and batch == batches[0]:
                    prefill[name].append(batch * context / first)
                if repeat:
                    decode[name][batch].append(1e3 * max(0.0, whole - first) / new_tokens)
    return {
        name: Speed(Timing.of(prefill[name]), {batch: Timing.of(ms) for batch, ms in decode[name].items()})
        for name in models
    }


def _random_ids(model: Any, rows: int, context: int) -> Tensor:
    ids = torch.randint(0, model.config.vocab_size, (rows, context), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


@torch.inference_mode()
def _seconds(model: Any, ids: Tensor, new_tokens: int) -> float:
    with evaluation_mode(model) as device:
        started = _now(device)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Way:
    """A way of writing: a name, and the keywords of `generate` that choose it."""

    name: str
    kind: str
    """`plain`, `depth`, `speculation` or `exits`."""
    options: dict[str, Any]


@dataclass(frozen=True)
class WaySpeed:
    """One way over all prompts."""

    way: Way
    ms_per_token: Timing
    """Prefill included, one prompt at a time."""
    tokens: int
    figures: dict[str, Any]
    """Of the way: acceptance and passes, or mean depth, histogram and agreement."""
    same_text: bool | None
    """Of drafts: whether every answer is the full model's, token by token; None for what is lossy by nature."""
    answers: list[tuple[list[int], tuple[int, ...] | None]]
    """Per prompt the new tokens, and for exits the depth that each was read at."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.way.name,
            "kind": self.way.kind,
            "ms_per_token": asdict(self.ms_per_token),
            "tokens_per_second": 1e3 / self.ms_per_token.value,
            "tokens": self.tokens,
            "same_text": self.same_text,
            **self.figures,
        }


def measure_ways(
    model: Any, prompts: Sequence[Sequence[int]], ways: Sequence[Way], *, new_tokens: int, repeats: int
) -> list[WaySpeed]:
    """Every way over the same prompts, one prompt at a time; the first way's answers are those that the others are held against."""
    given = [torch.tensor([list(prompt)], device=model.device) for prompt in prompts]
    found = [[_write(model, ids, way, new_tokens) for ids in given] for way in ways]  # warm-up, and what is counted
    lengths = [[answer.ids.shape[1] - ids.shape[1] for answer, ids in zip(row, given)] for row in found]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        spent = [0.0] * len(ways)
        for ids in given:
            for place, way in enumerate(ways):
                spent[place] += _timed(model, ids, way, new_tokens)
        for place, seconds in enumerate(spent):
            times[place].append(1e3 * seconds / sum(lengths[place]))
    reference = [answer.ids.tolist() for answer in found[0]]
    return [
        WaySpeed(
            way,
            Timing.of(times[place]),
            sum(lengths[place]),
            _figures([answer.stats for answer in found[place]]),
            None if way.kind in ("depth", "exits") else [answer.ids.tolist() for answer in found[place]] == reference,
            [_answer(answer, ids) for answer, ids in zip(found[place], given)],
        )
        for place, way in enumerate(ways)
    ]


def _write(model: nn.Module, ids: Tensor, way: Way, new_tokens: int) -> Any:
    chosen: Any = model
    options: dict[str, Any] = {**way.options, **({"agreement": True} if way.kind == "exits" else {})}
    return generate(chosen, ids, max_new_tokens=new_tokens, return_stats=True, **options)


def _timed(model: nn.Module, ids: Tensor, way: Way, new_tokens: int) -> float:
    chosen: Any = model
    started = _now(ids.device)
    generate(chosen, ids, max_new_tokens=new_tokens, **way.options)
    return _now(ids.device) - started


def _answer(answer: Any, ids: Tensor) -> tuple[list[int], tuple[int, ...] | None]:
    new = answer.ids[0, ids.shape[1] :].tolist()
    return new, answer.stats.depths[0] if isinstance(answer.stats, ExitStats) else None


def _figures(stats: Sequence[Any]) -> dict[str, Any]:
    """Sums over prompts."""
    drafts = [one for one in stats if isinstance(one, SpeculationStats)]
    if drafts:
        names = ("rounds", "drafted", "accepted", "early_passes", "full_passes")
        sums = {name: sum(getattr(one, name) for one in drafts) for name in names}
        return {"acceptance": sums["accepted"] / max(1, sums["drafted"]), **sums}
    exits = [one for one in stats if isinstance(one, ExitStats)]
    if not exits:
        return {}
    histogram: dict[int, int] = {}
    for one in exits:
        for depth, count in one.histogram.items():
            histogram[depth] = histogram.get(depth, 0) + count
    tokens = sum(histogram.values())
    agreed = sum((one.agreement or 0.0) * sum(one.histogram.values()) for one in exits)
    return {
        "mean_depth": sum(depth * count for depth, count in histogram.items()) / tokens,
        "histogram": {str(depth): count for depth, count in sorted(histogram.items())},
        "agreement": agreed / tokens,
    }
