"""The stream of rows: which source and which of its rows comes at each place of the training order.

Sources are interleaved by stratified sampling: the j-th row of a source with share w stands at time (j + u) / w, u drawn evenly from
[0, 1) for each row, and rows come in the order of their times. So every stretch of the stream holds each source in its share to
within one row, the order depends on the seed, the names and the shares alone, and a longer stream begins with the shorter one.
Inside a source each pass is a new permutation: no row comes twice before all have come once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparsmith.errors import DataError
from sparsmith.recipe.mixture import MixtureSettings
from sparsmith.recipe.schema import TrainSource
from sparsmith.seeds import numpy_generator


@dataclass(frozen=True)
class Part:
    """A source as the mixture sees it."""

    name: str
    domain: str
    rows: int
    rate: float = 1.0
    cap: int | None = None

    @property
    def size(self) -> int:
        """Rows that count for the weight."""
        return min(self.rows, self.cap or self.rows)


def parts_of(sources: Sequence[TrainSource], rows: Sequence[int]) -> list[Part]:
    """The recipe's sources with their numbers of rows."""
    return [Part(source.name, source.domain, count, source.rate, source.cap) for source, count in zip(sources, rows)]


def parts_of_tasks(mixture: MixtureSettings, rows: Sequence[int]) -> list[Part]:
    """A mixture's tasks, with rates that are their shares: rate of the sub-mixture x min(rows, cap) / the sum of that inside it."""
    left = iter(rows)
    total = sum(mixture.rate_of(sub) for sub in mixture.submixtures)
    parts: list[Part] = []
    for sub in mixture.submixtures:
        cap = mixture.cap_of(sub)
        inside = [Part(task.name, task.domain or sub.name, next(left), 1.0, cap) for task in sub.tasks]
        weight = sum(part.size for part in inside)
        share = mixture.rate_of(sub) / total
        parts += [replace(part, rate=share * part.size / weight) for part in inside]
    return parts


def shares(parts: Sequence[Part], mixing: str) -> np.ndarray:
    """(sources,) float64, > 0, sums to 1."""
    for part in parts:
        if not (part.rate > 0 and np.isfinite(part.rate)):
            raise DataError(
                f"data source `{part.name}`",
                f"the rate {part.rate}",
                "a number above 0",
                "Raise the rate, or remove the source.",
            )
        if part.rows < 1:
            raise DataError(f"data source `{part.name}`", "no row", "at least one", "Check its file and `columns`.")
    if mixing not in ("sizes", "rates", "balanced"):
        raise DataError("data.mixing", f"`{mixing}`", "sizes, rates or balanced", "Choose one of them.")
    weights = np.array([part.rate if mixing == "rates" else part.rate * part.size for part in parts], np.float64)
    if mixing == "balanced":
        totals = {part.domain: sum(w for w, p in zip(weights, parts) if p.domain == part.domain) for part in parts}
        weights = np.array([w / totals[p.domain] for w, p in zip(weights, parts)], np.float64)
    return weights / weights.sum()


def epoch_rows(parts: Sequence[Part]) -> int:
    """Rows of one epoch: the sum of min(rows, cap). With `sizes` and rates of 1 an epoch holds each counted row once."""
    return sum(part.size for part in parts)


def stream(parts: Sequence[Part], mixing: str, seed: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, row) of each place, both (length,) int64."""
    weights = shares(parts, mixing)
    times, sources = [], []
    for number, (part, weight) in enumerate(zip(parts, weights)):
        count = int(np.ceil((length + len(parts) + 1) * weight)) + 2
        shift = numpy_generator(seed, f"data.mixture.{part.name}").random(count)
        times.append((np.arange(count) + shift) / weight)
        sources.append(np.full(count, number, np.int64))
    order = np.argsort(np.concatenate(times), kind="stable")[:length]
    source = np.concatenate(sources)[order]
    rows = np.empty(length, np.int64)
    for number, part in enumerate(parts):
        here = source == number
        rows[here] = _passes(part, seed, int(here.sum()))
    return source, rows


def _passes(part: Part, seed: int, count: int) -> np.ndarray:
    """The first `count` rows of a source: one permutation after the other."""
    passes = -(-count // part.rows)
    orders = [
        numpy_generator(seed, f"data.order.{part.name}", number).permutation(part.rows) for number in range(passes)
    ]
    return np.concatenate(orders)[:count] if orders else np.zeros(0, np.int64)
