"""Intervals for measured figures: a 95 % percentile bootstrap over rows, and paired differences on the same rows.

Every metric is a ratio of sums over rows: held-out loss is (summed loss) / (labelled tokens), accuracy is (hits) / (rows). A resample
draws the rows of each set anew, with replacement. A domain pools the sums of its sets; `overall` is the plain mean of the domains, so
that a large domain does not hide a small one. The draws of a set depend on the run's seed, the set's name and its number of rows alone:
two systems measured on the same rows are resampled alike, which is what makes their difference a paired one.

Price: resamples x rows integers per set (1,000 x 200 by default: milliseconds). A set whose rows all score alike gets an interval of
width zero; that says nothing about rows not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsmith.seeds import numpy_generator

if TYPE_CHECKING:
    import numpy

RESAMPLES = 1000
CONFIDENCE = 0.95
_BLOCK = 2_000_000  # draws held at once: 16 MB


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Rows it was measured on."""

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class RowScores:
    """One metric of one set, row by row; the metric is `sum(total) / sum(weight)`."""

    total: tuple[float, ...]
    """Summed loss of the row, 1.0 for a hit, ..."""
    weight: tuple[float, ...]
    """Labelled tokens of the row, or 1.0."""

    def as_dict(self) -> dict[str, list[float]]:
        return {"total": list(self.total), "weight": list(self.weight)}

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> RowScores:
        return cls(tuple(map(float, raw["total"])), tuple(map(float, raw["weight"])))


SetScores = Mapping[str, Mapping[str, RowScores]]
"""Set name -> metric -> rows."""
Figures = dict[str, dict[str, Figure]]
"""Set or domain name -> metric -> figure."""


@dataclass(frozen=True)
class Summary:
    """Figures at the three levels."""

    sets: Figures
    domains: Figures
    overall: dict[str, Figure]
    """Mean over domains."""


@dataclass(frozen=True)
class _Sums:
    """Numerators and denominators: index 0 is the data as measured, 1.. are resamples. (1 + R,) each."""

    total: numpy.ndarray
    weight: numpy.ndarray
    n: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.total + other.total, self.weight + other.weight, self.n + other.n)


def _resample(rows: RowScores, name: str, seed: int, resamples: int) -> _Sums:
    import numpy as np

    total_N, weight_N = np.asarray(rows.total, dtype=np.float64), np.asarray(rows.weight, dtype=np.float64)
    n = len(total_N)
    stream = numpy_generator(seed, f"bootstrap.{name}", n)
    totals, weights = [total_N.sum(keepdims=True)], [weight_N.sum(keepdims=True)]
    block = max(1, _BLOCK // n)
    for start in range(0, resamples, block):
        draw_RN = stream.integers(0, n, (min(block, resamples - start), n))
        totals.append(total_N[draw_RN].sum(1))
        weights.append(weight_N[draw_RN].sum(1))
    return _Sums(np.concatenate(totals), np.concatenate(weights), n)


def _ratios(
    scores: SetScores, domain_of: Mapping[str, str], seed: int, resamples: int
) -> Iterator[tuple[str, str, str, numpy.ndarray, int]]:
    """(level, name, metric, ratio of every resample (1 + R,), rows), for the sets, then the domains, then the whole."""
    import numpy as np

    pooled: dict[str, dict[str, _Sums]] = {}
    for name, metrics in scores.items():
        domain = pooled.setdefault(domain_of[name], {})
        for metric, rows in metrics.items():
            sums = _resample(rows, name, seed, resamples)
            yield "sets", name, metric, sums.total / sums.weight, sums.n
            domain[metric] = domain[metric] + sums if metric in domain else sums
    whole: dict[str, list[tuple[numpy.ndarray, int]]] = {}
    for domain_name, figures in pooled.items():
        for metric, sums in figures.items():
            ratio = sums.total / sums.weight
            yield "domains", domain_name, metric, ratio, sums.n
            whole.setdefault(metric, []).append((ratio, sums.n))
    for metric, parts in whole.items():
        yield "overall", "", metric, np.mean([ratio for ratio, _ in parts], axis=0), sum(n for _, n in parts)


def _figure(ratio: numpy.ndarray, n: int) -> Figure:
    import numpy as np

    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(ratio[1:], [tail, 100 - tail])
    return Figure(float(ratio[0]), float(low), float(high), n)


def _collect(ratios: Iterator[tuple[str, str, str, numpy.ndarray, int]]) -> Summary:
    summary = Summary({}, {}, {})
    for level, name, metric, ratio, n in ratios:
        home = summary.overall if level == "overall" else getattr(summary, level).setdefault(name, {})
        home[metric] = _figure(ratio, n)
    return summary


def summarise(scores: SetScores, domain_of: Mapping[str, str], *, seed: int, resamples: int = RESAMPLES) -> Summary:
    """Every metric per set, per domain and overall, each with its 95 % interval."""
    return _collect(_ratios(scores, domain_of, seed, resamples))


def paired_differences(
    first: SetScores, second: SetScores, domain_of: Mapping[str, str], *, seed: int, resamples: int = RESAMPLES
) -> Summary:
    """`second - first` for every set and metric that both measured on the same number of rows.

    An interval that leaves out 0 says that the difference is more than the choice of rows.
    """
    return contrast([(-1, first), (1, second)], domain_of, seed=seed, resamples=resamples)


def contrast(
    parts: Sequence[tuple[int, SetScores]], domain_of: Mapping[str, str], *, seed: int, resamples: int = RESAMPLES
) -> Summary:
    """The signed sum of several systems' figures, each measured on the same rows, as (B after - B before) - (A after - A before).

    Every set and metric that all of them measured on the same number of rows; a resample draws the same rows for all.
    """
    (_, first), *others = parts
    shared = {
        name: [m for m, rows in metrics.items() if all(_same(other.get(name, {}).get(m), rows) for _, other in others)]
        for name, metrics in first.items()
    }
    kept = [
        (sign, {name: {m: scores[name][m] for m in metrics} for name, metrics in shared.items() if metrics})
        for sign, scores in parts
    ]
    runs = [_ratios(scores, domain_of, seed, resamples) for _, scores in kept]
    signs = [sign for sign, _ in kept]
    return _collect(
        (*one[0][:3], sum(sign * ratio for sign, (*_, ratio, _) in zip(signs, one)), one[0][4])
        for one in zip(*runs, strict=True)
    )


def _same(other: RowScores | None, rows: RowScores) -> bool:
    return other is not None and len(other.total) == len(rows.total)
