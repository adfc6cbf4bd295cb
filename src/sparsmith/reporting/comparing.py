"""Before and after: every metric of the base and of each run, and the paired differences to the run that the report is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsmith.bootstrap import Figure, Summary, paired_differences
from sparsmith.reporting.folder import Run
from sparsmith.reporting.words import MINUS, UNIT, signed

OVERALL = "mean of domains"


@dataclass(frozen=True)
class System:
    """A column of the table."""

    name: str
    run: Run
    key: str
    """`base` or `tuned`."""

    @property
    def result(self) -> dict[str, Any]:
        return (self.run.evaluation or {}).get(self.key) or {}


@dataclass(frozen=True)
class Cell:
    """A figure as text."""

    value: str
    interval: str
    tone: str = ""
    """`best` for the best of its row; `better`, `worse`, `same` for a difference."""


@dataclass(frozen=True)
class Metric:
    """One metric's part of the table."""

    key: str
    title: str
    larger_is_better: bool
    unit: str
    """`share` or `nats`."""
    rows: list[tuple[str, int, list[Cell | None]]]
    """(domain or set, rows measured, cells: systems, then differences)"""
    figures: list[tuple[str, dict[str, Figure]]]
    """The same as numbers, for the plot."""


def systems_of(runs: Sequence[Run]) -> list[System]:
    """The base, the runs to compare with, and last the run that the report is about; those that were measured."""
    main, *others = runs
    found = [System("base", main, "base"), *(System(run.name, run, "tuned") for run in [*others, main])]
    return [system for system in found if system.result]


def compare(runs: Sequence[Run], level: str = "domains") -> tuple[list[System], list[str], list[Metric]]:
    """(systems, heads of the difference columns, metrics) at the level `domains` or `sets`."""
    return compare_systems(systems_of(runs), level)


def compare_systems(systems: list[System], level: str = "domains") -> tuple[list[System], list[str], list[Metric]]:
    """`compare` for columns that are chosen already; the last is the one that the others differ from."""
    if not systems:
        return [], [], []
    main = systems[-1]
    gaps = [(f"{main.name} {MINUS} {other.name}", _difference(other, main)) for other in systems[:-1]]
    facts = {key: value for system in systems for key, value in (system.result.get("metrics") or {}).items()}
    metrics = [_metric(key, fact, systems, [gap for _, gap in gaps], level) for key, fact in facts.items()]
    return systems, [head for head, _ in gaps], [metric for metric in metrics if metric.rows]


def several_sets(runs: Sequence[Run]) -> bool:
    """Whether some domain has more than one set, so that the sets say more than the domains."""
    domains = [domain for system in systems_of(runs) for domain in set(system.result.get("domain_of", {}).items())]
    return len({name for name, _ in domains}) > len({domain for _, domain in domains})


def _difference(other: System, main: System) -> Summary:
    prints = main.result.get("fingerprints", {})
    same = {name for name, value in other.result.get("fingerprints", {}).items() if prints.get(name) == value}
    before = {name: rows for name, rows in other.run.rows(other.key).items() if name in same}
    settings = {"seed": int(main.result.get("seed", 42)), "resamples": max(2, int(main.result.get("resamples", 1000)))}
    return paired_differences(before, main.run.rows(main.key), main.result["domain_of"], **settings)


def _metric(key: str, fact: dict[str, Any], systems: list[System], gaps: list[Summary], level: str) -> Metric:
    places = list(dict.fromkeys(place for system in systems for place in system.result.get(level, {})))
    figures = [
        (place, {s.name: Figure(**f) for s in systems if (f := s.result.get(level, {}).get(place, {}).get(key))})
        for place in places
    ]
    differences = [[getattr(gap, level).get(place, {}).get(key) for gap in gaps] for place in places]
    if sum(bool(found) for _, found in figures) > 1 and level == "domains":
        figures.append((OVERALL, {s.name: Figure(**f) for s in systems if (f := s.result.get("overall", {}).get(key))}))
        differences.append([gap.overall.get(key) for gap in gaps])
    unit, larger = str(fact.get("unit", "share")), bool(fact.get("larger_is_better", True))
    rows = []
    for (place, found), gap_row in zip(figures, differences):
        if found:
            best = _best(found, larger)
            cells = [_cell(found[s.name], unit, s.name in best) if s.name in found else None for s in systems]
            rows.append((place, next(iter(found.values())).n, [*cells, *(_gap(gap, unit, larger) for gap in gap_row)]))
    return Metric(
        key, str(fact.get("title", key)), larger, unit, rows, [(place, found) for place, found in figures if found]
    )


def _best(figures: dict[str, Figure], larger: bool) -> set[str]:
    if len({figure.value for figure in figures.values()}) < 2:
        return set()
    top = (max if larger else min)(figure.value for figure in figures.values())
    return {name for name, figure in figures.items() if figure.value == top}


def _cell(figure: Figure, unit: str, best: bool) -> Cell:
    scale, digits = (100, 1) if unit == "share" else (1, 3)
    value, low, high = (f"{scale * x:.{digits}f}".replace("-", MINUS) for x in (figure.value, figure.low, figure.high))
    return Cell(value + (f"{UNIT}%" if unit == "share" else ""), f"{low} – {high}", "best" if best else "")


def _gap(figure: Figure | None, unit: str, larger: bool) -> Cell | None:
    if figure is None:
        return None
    scale, digits = (100, 1) if unit == "share" else (1, 3)
    sure = figure.low > 0 or figure.high < 0
    tone = ("better" if (figure.value > 0) == larger else "worse") if sure else "same"
    value, low, high = (signed(scale * x, digits) for x in (figure.value, figure.low, figure.high))
    return Cell(value, f"{low} to {high}", tone)
