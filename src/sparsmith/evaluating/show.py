"""Results side by side in the terminal: one row per domain (or set) and metric, one column per system, the best in bold."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Protocol

from rich.console import Console
from rich.table import Table

from sparsmith.bootstrap import Figure, Figures
from sparsmith.evaluating.metrics import METRICS, NATS, words

_SHOWN = ("loss", "accuracy", "agreement", "exact_match", "rank", "rank_by_token", "rank_by_byte")


class Levels(Protocol):
    """What is shown of a result: the figures of its sets, of its domains, and overall."""

    @property
    def sets(self) -> Figures: ...
    @property
    def domains(self) -> Figures: ...
    @property
    def overall(self) -> dict[str, Figure]: ...


def number(figure: Figure, metric: str) -> str:
    """`2.314 [2.201, 2.420]`; shares in percent: `41.0 % [34.5, 47.5]`."""
    if metric in NATS:
        return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
    return f"{100 * figure.value:.1f} % [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


def best_of(figures: Mapping[str, Figure], metric: str) -> set[str]:
    """The systems with the best value; nobody is best where all are equal."""
    if len({figure.value for figure in figures.values()}) < 2:
        return set()
    choose = max if METRICS.get(metric, ("", True))[1] else min
    top = choose(figure.value for figure in figures.values())
    return {name for name, figure in figures.items() if figure.value == top}


def result_table(results: Mapping[str, Levels], *, title: str = "", by_set: bool = False) -> Table:
    """System name -> result, as a table with 95 % intervals."""
    table = Table(
        title=title or None, caption="95 % bootstrap intervals over rows", title_justify="left", caption_justify="left"
    )
    for head in ("metric", "set" if by_set else "domain"):
        table.add_column(head)
    for name in ("rows", *results):
        table.add_column(name, justify="right")
    measured = {metric for result in results.values() for metric in result.overall}
    for metric in _SHOWN:
        for place, figures in _places(results, metric, by_set):
            best = best_of(figures, metric)
            cells = [_cell(figures.get(name), metric, name in best) for name in results]
            n = str(next(iter(figures.values())).n)
            table.add_row(words(metric, measured), place, n, *cells, end_section=place == "mean of domains")
    return table


def _places(results: Mapping[str, Levels], metric: str, by_set: bool) -> list[tuple[str, dict[str, Figure]]]:
    levels = {name: result.sets if by_set else result.domains for name, result in results.items()}
    names = list(dict.fromkeys(place for level in levels.values() for place in level))
    found = [(p, {s: level[p][metric] for s, level in levels.items() if metric in level.get(p, {})}) for p in names]
    found = [(place, figures) for place, figures in found if figures]
    if len(found) > 1 and not by_set:
        found.append(("mean of domains", {s: r.overall[metric] for s, r in results.items() if metric in r.overall}))
    return found


def _cell(figure: Figure | None, metric: str, best: bool) -> str:
    if figure is None:
        return "-"
    text = number(figure, metric).replace("[", r"\[")
    return f"[bold]{text}[/bold]" if best else text


def plain_text(table: Table, width: int = 140) -> str:
    """The table without colours."""
    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]
