"""What a text took: tokens, time, and where its tokens were read; as data and as lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsmith.inference.generate import Stats


@dataclass(frozen=True)
class Spent:
    """Of one prompt."""

    tokens: int
    """New ones, the end token included."""
    seconds: float
    """From the prompt to the last token, the prompt's own pass included."""
    blocks: int
    """Of the whole model."""
    stats: Stats | None
    """None for the whole model, token by token."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        rounded = {"seconds": round(self.seconds, 4), "tokens_per_second": round(self.tokens_per_second, 2)}
        return {"tokens": self.tokens, **rounded, "blocks": self.blocks, **_figures(self.stats)}

    def __str__(self) -> str:
        head = f"{self.tokens} tokens in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s"
        return "\n".join([head, *_lines(self.stats, self.blocks)])


def _figures(stats: Stats | None) -> dict[str, Any]:
    from sparsmith.inference import ExitStats, SpeculationStats

    if stats is None:
        return {}
    if isinstance(stats, ExitStats):
        return {
            "mean_depth": round(stats.mean_depth, 4),
            "histogram": {str(depth): n for depth, n in stats.histogram.items()},
            "passes": {str(depth): n for depth, n in stats.passes.items()},
        }
    if isinstance(stats, SpeculationStats):
        names = ("exit", "rounds", "drafted", "accepted", "rejected", "early_passes", "full_passes")
        return {"acceptance": round(stats.acceptance, 4), **{name: getattr(stats, name) for name in names}}
    return {"depth": stats.depths[0]}


def _lines(stats: Stats | None, blocks: int) -> list[str]:
    from sparsmith.inference import ExitStats, SpeculationStats

    if stats is None:
        return [f"depth: all {blocks} blocks"]
    if isinstance(stats, ExitStats):
        total = max(1, sum(stats.histogram.values()))
        left = ", ".join(f"{depth}: {n} ({100 * n / total:.0f} %)" for depth, n in stats.histogram.items())
        passes = ", ".join(f"{depth}: {n}" for depth, n in stats.passes.items())
        return [
            f"mean depth: {stats.mean_depth:.2f} of {blocks} blocks",
            f"tokens by the depth they left at: {left}",
            f"passes through the blocks up to each depth: {passes}",
        ]
    if isinstance(stats, SpeculationStats):
        return [
            f"drafts: {stats.accepted} of {stats.drafted} stood ({100 * stats.acceptance:.1f} %), in {stats.rounds} rounds",
            f"passes: {stats.early_passes} through the first {stats.exit} blocks, {stats.full_passes} through the rest",
        ]
    return [f"depth: {stats.depths[0]} of {blocks} blocks"]
