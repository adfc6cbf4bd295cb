"""What the protocols share: one tuned run as a cell, and differences paired within each seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsmith.bootstrap import Figure, paired_differences
from sparsmith.durable import read_json
from sparsmith.evaluating import DepthResult, EvalResult
from sparsmith.runs import RunFolder


@dataclass(frozen=True)
class Cell:
    """One arm of a comparison with one seed: a finished run."""

    arm: str
    seed: int
    run: Path
    result: EvalResult
    """Of the tuned model at full depth."""
    plan: dict[str, Any]
    facts: dict[str, Any]
    by_depth: DepthResult | None = None
    """Where the run has several depths."""


def read_cell(arm: str, seed: int, folder: RunFolder) -> Cell:
    """A finished run as a cell."""
    evaluation = read_json(folder.evaluation)
    result = EvalResult.from_json(evaluation["tuned"])
    by_depth = DepthResult.from_json(evaluation["depths"]) if "depths" in evaluation else None
    return Cell(arm, seed, folder.root, result, read_json(folder.plan), read_json(folder.facts), by_depth)


def pooled_difference(pairs: Iterable[tuple[int, EvalResult, EvalResult]], metric: str = "loss") -> Figure | None:
    """Second minus first, rows paired within each seed and pooled over the seeds; None where there is no pair.

    The interval is over rows; how much seeds differ is told by the standard deviation.

    Args:
        pairs: (seed, first, second).
    """
    old, new, domain_of = {}, {}, {}
    for seed, first, second in pairs:
        for name, rows in first.rows.items():
            key = f"{seed}:{name}"
            old[key], new[key] = rows, second.rows[name]
            domain_of[key] = first.domain_of[name]
    return paired_differences(old, new, domain_of, seed=0).overall.get(metric) if old else None


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for one seed."""
    return statistics.stdev(values) if len(values) > 1 else None


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the expansion around the normal one is good to 0.002."""


def over_seeds(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval that Student's t gives the mean of the seeds' own figures: what another draw of the seeds might change,
    which an interval over rows does not tell. None for one seed."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    quantile = _T[freedom - 1] if freedom <= len(_T) else 1.960 + 2.372 / freedom + 2.822 / freedom**2
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
