"""Which exits a micro-batch computes and how much each weighs: pure numbers, no torch.

Paper: Sorted LLaMA (arXiv 2309.08968) §3, Eq. 1: every exit at every step, equal weights. The rest is ours or LayerSkip's (arXiv
2404.16710 §4), each said at its function.

A draw is a function of (seed, step, micro-batch) alone: every rank makes the same one, and a resumed run needs nothing saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparsmith.seeds import stream_seed

Weights = Mapping[int, float]
"""Depth -> omega, > 0, sum 1."""


def auto_exits(layers: int) -> tuple[int, ...]:
    """N/4, 3N/8, ... N in steps of N/8, rounded, each once."""
    return tuple(sorted({max(1, math.floor(layers * eighth / 8 + 0.5)) for eighth in range(2, 9)}))


def paper_exits(layers: int) -> tuple[int, ...]:
    """The paper's 12, 16, ... 40 of 40, at the same shares of another depth."""
    return tuple(sorted({max(1, math.floor(layers * tenth / 10 + 0.5)) for tenth in range(3, 11)}))


def exit_weights(kind: str, exits: Sequence[int], *, e_scale: float = 0.2, boost: float = 0.5) -> dict[int, float]:
    """omega_n of every exit.

    `uniform` is Eq. 1; `linear` is proportional to the depth; `sum_l` is LayerSkip's (with l = n - 1: e(l) = e_scale * (0 + ... + l) below
    the last, N - 1 + e_scale * (0 + ... + N - 2) for the last); `full_boost` gives the full depth `boost` and the others equal parts of
    what is left.
    """
    last = exits[-1]
    if len(exits) == 1:
        return {last: 1.0}
    if kind == "uniform":
        raw = dict.fromkeys(exits, 1.0)
    elif kind == "linear":
        raw = {n: float(n) for n in exits}
    elif kind == "sum_l":
        raw = {n: e_scale * n * (n - 1) / 2 for n in exits}
        raw[last] = (last - 1) + e_scale * (last - 1) * (last - 2) / 2
    elif kind == "full_boost":
        raw = {n: (1 - boost) / (len(exits) - 1) for n in exits}
        raw[last] = boost
    else:
        raise ValueError(kind)
    total = sum(raw.values())
    return {n: value / total for n, value in raw.items()}


def draw_index(count: int, seed: int, step: int, micro: int) -> int:
    """A number below `count`, from the stream `soft.exits`."""
    return stream_seed(seed, "soft.exits", step, micro) % count


def active_weights(
    weights: Weights, schedule: str, *, draw: int, step: int, rotation: int = 4, half: bool = False
) -> dict[int, float]:
    """The exits that this micro-batch computes, with their factors.

    Args:
        weights: omega of all exits.
        schedule: `all`; `sandwich`: N and one other, unbiased (factor of the other times their number) or .5/.5 (`half`, biased to N);
            `sampled`: one of all, times their number, unbiased; `rotational` (LayerSkip's, but N always on): N and every exit whose index
            is the step modulo `rotation`, renormalised, biased.
        draw: for `sandwich` an index into the exits below N, for `sampled` into all.
    """
    exits, last = sorted(weights), max(weights)
    if schedule == "all" or len(exits) == 1:
        return dict(weights)
    if schedule == "sandwich":
        other = exits[:-1][draw]
        if half:
            return {other: 0.5, last: 0.5}
        return {other: (len(exits) - 1) * weights[other], last: weights[last]}
    if schedule == "sampled":
        return {exits[draw]: len(exits) * weights[exits[draw]]}
    if schedule == "rotational":
        on = [n for index, n in enumerate(exits) if n == last or index % rotation == step % rotation]
        total = sum(weights[n] for n in on)
        return {n: weights[n] / total for n in on}
    raise ValueError(schedule)


def choices(schedule: str, exits: int) -> int:
    """How many draws a schedule has; 1 = none."""
    return {"sandwich": max(exits - 1, 1), "sampled": exits}.get(schedule, 1)


def drop_probability(layer: int, layers: int, most: float) -> float:
    """LayerSkip's chance that block `layer` (from 0) is left out: most * (exp(layer * ln 2 / (N - 1)) - 1); 0 for the first."""
    return most * (2 ** (layer / max(layers - 1, 1)) - 1)


def kept_layers(layers: int, most: float, *, seed: int, step: int, micro: int) -> tuple[int, ...]:
    """The blocks that this micro-batch runs: one draw each, from the stream `soft.layers`."""
    if most <= 0:
        return tuple(range(layers))
    chance = [stream_seed(seed, "soft.layers", step, micro, layer) / 2**63 for layer in range(layers)]
    return tuple(layer for layer in range(layers) if chance[layer] >= drop_probability(layer, layers, most))
