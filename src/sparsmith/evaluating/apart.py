"""Two averages that are never mixed: over the sets that training has not seen, and over those of a family that it has.

Paper: FLAN-MoE (arXiv 2305.14705) reports suites as held out of which the mixture holds some families (GSM8K and StrategyQA among its
chain-of-thought sets, BoolQ and ARC in Muffin); what is won on those is no transfer to new tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsmith.bootstrap import Figure, Figures, summarise
from sparsmith.data.overlap_report import OverlapReport
from sparsmith.errors import UsageError
from sparsmith.evaluating.depths import DepthResult
from sparsmith.evaluating.metrics import words
from sparsmith.evaluating.result import EvalResult
from sparsmith.evaluating.show import best_of, number, result_table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class CleanAndSeen:
    """The two averages of one result, each the mean over the domains of its own sets."""

    clean: dict[str, Figure]
    """Metric -> mean over the clean sets; empty where there is none."""
    seen: dict[str, Figure]
    """Metric -> mean over the sets of seen families and the contaminated ones."""
    clean_sets: tuple[str, ...]
    seen_sets: tuple[str, ...]

    @property
    def both(self) -> bool:
        """Whether there are sets of either kind, so that an average over all would mix them."""
        return bool(self.clean_sets and self.seen_sets)

    def as_dict(self) -> dict[str, Any]:
        sides = {"clean": (self.clean_sets, self.clean), "seen": (self.seen_sets, self.seen)}
        return {
            name: {"sets": list(sets), "overall": {metric: figure.as_dict() for metric, figure in figures.items()}}
            for name, (sets, figures) in sides.items()
        }


def clean_and_seen(result: EvalResult, report: OverlapReport) -> CleanAndSeen:
    """The averages of a result, apart.

    Raises:
        UsageError: a set of the result of which the report tells nothing.
    """
    unknown = [name for name in result.rows if name not in report.sets]
    if unknown:
        raise UsageError(
            f"overlap of {unknown[0]}",
            "no word of this set",
            "a report on every evaluation set",
            "Run `sparsmith data overlap` again.",
        )
    clean = tuple(name for name in result.rows if report.sets[name].is_clean)
    seen = tuple(name for name in result.rows if name not in clean)
    return CleanAndSeen(_mean(result, clean), _mean(result, seen), clean, seen)


def _mean(result: EvalResult, names: tuple[str, ...]) -> dict[str, Figure]:
    rows = {name: result.rows[name] for name in names}
    return summarise(rows, result.domain_of, seed=result.seed, resamples=result.resamples).overall


@dataclass(frozen=True)
class ApartResult:
    """An evaluation with its averages apart: what `sparsmith eval RUN` prints."""

    result: EvalResult | DepthResult
    report: OverlapReport

    def named(self) -> dict[str, EvalResult]:
        """The result, of a depth-elastic model one for every depth."""
        if isinstance(self.result, DepthResult):
            return {f"depth {depth}": one for depth, one in self.result.depths.items()}
        return {"value": self.result}

    def apart(self) -> dict[str, CleanAndSeen]:
        return {name: clean_and_seen(one, self.report) for name, one in self.named().items()}

    def as_dict(self) -> dict[str, Any]:
        """The result's own data and the averages under `overlap`; where sets of both kinds were measured `overall` and `domains`, which
        would mix them, are empty."""
        told = self.result.as_dict() if isinstance(self.result, DepthResult) else self.result.to_json()
        apart = self.apart()
        if any(one.both for one in apart.values()):
            for one in (told, *told.get("depths", {}).values()):
                one |= {"overall": {}, "domains": {}}
        sets = {name: {"verdict": one.verdict, "shared": one.shared} for name, one in self.report.sets.items()}
        averages = {name: one.as_dict() for name, one in apart.items()}
        shown = averages["value"] if list(averages) == ["value"] else averages
        return {**told, "overlap": {"basis": self.report.basis, "sets": sets, "averages": shown}}

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        apart = self.apart()
        both = any(one.both for one in apart.values())
        first = result_table(self.named(), by_set=True) if both else self.result.table()
        return Group(first, *([self._averages(apart)] if both else [Text(self._one_kind(apart))]))

    def _one_kind(self, apart: Mapping[str, CleanAndSeen]) -> str:
        clean = any(one.clean_sets for one in apart.values())
        kind = "clean" if clean else "of a family that was trained on, or contaminated"
        return f"Every set is {kind} ({self.report.basis})."

    def _averages(self, apart: Mapping[str, CleanAndSeen]) -> Table:
        from rich.table import Table

        table = Table(title="Means of domains, apart", title_justify="left", caption_justify="left")
        for head in ("metric", "over"):
            table.add_column(head)
        for name in apart:
            table.add_column(name, justify="right")
        first = next(iter(apart.values()))
        sides: dict[str, tuple[tuple[str, ...], Figures]] = {
            "clean": (first.clean_sets, {name: one.clean for name, one in apart.items()}),
            "seen": (first.seen_sets, {name: one.seen for name, one in apart.items()}),
        }
        measured = {metric for _, side in sides.values() for figures in side.values() for metric in figures}
        for metric in sorted(measured):
            for kind, (names, side) in sides.items():
                figures = {name: one[metric] for name, one in side.items() if metric in one}
                if figures:
                    best = best_of(figures, metric)
                    cells = [_cell(figures.get(name), metric, name in best) for name in apart]
                    table.add_row(words(metric, measured), f"{kind}: {', '.join(names)}", *cells)
        table.caption = self.report.basis
        return table


def _cell(figure: Figure | None, metric: str, best: bool) -> str:
    if figure is None:
        return "-"
    text = number(figure, metric).replace("[", r"\[")
    return f"[bold]{text}[/bold]" if best else text
