"""Figures of gates, each a function of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sparsmith.bootstrap import Figure as Measured
from sparsmith.reporting.palette import INK
from sparsmith.reporting.plots import WIDTH, style

STATES = {"open": "#0a4a86", "soft": "#e8a317", "closed": "#d8dde3"}
Table = Sequence[Sequence[int]]
"""Per layer: closed, soft, open."""


def shares_over_steps(panels: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[float]]]]) -> Figure:
    """Stacked shares of open, soft and closed gates, a panel per run."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(WIDTH, 2.5 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axis, (name, (steps, shares)) in zip(axes.flat, panels.items()):
            series = [[100 * value for value in shares[state]] for state in STATES]
            axis.stackplot(steps, *series, colors=list(STATES.values()), linewidth=0)
            axis.set_title(name)
            axis.set_ylim(0, 100)
            axis.set_xlabel("optimiser step")
            axis.set_ylabel("% of gates")
            axis.margins(x=0)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        _states(figure)
    return figure


def layers(rows: Mapping[str, Table]) -> Figure:
    """One bar per layer, a panel per kind of gate: open, soft, closed."""
    with style():
        figure = Figure(figsize=(WIDTH, 2.5 * len(rows) + 0.4), layout="constrained")
        axes = figure.subplots(len(rows), 1, squeeze=False)
        for axis, (name, table) in zip(axes.flat, rows.items()):
            places, bottom = range(len(table)), [0] * len(table)
            for state, column in (("open", 2), ("soft", 1), ("closed", 0)):
                heights = [row[column] for row in table]
                axis.bar(places, heights, bottom=bottom, color=STATES[state], width=0.78)
                bottom = [low + height for low, height in zip(bottom, heights)]
            axis.set_title(name)
            axis.set_xlabel("block")
            axis.xaxis.set_major_locator(MaxNLocator(min(16, len(table)), integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _states(figure)
    return figure


def histogram(bins: Sequence[tuple[float, float, int]]) -> Figure:
    """(low, high, count) as bars."""
    with style():
        figure = Figure(figsize=(0.62 * WIDTH, 2.6), layout="constrained")
        axis = figure.subplots()
        for low, high, count in bins:
            axis.bar((low + high) / 2, count, width=0.92 * (high - low), color=STATES["open"])
        axis.set_xlim(0, 1.02)
        axis.set_xlabel("value of the gate")
        axis.set_ylabel("gates")
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def quality(points: Sequence[tuple[str, float, Measured]], colours: Mapping[str, str]) -> Figure:
    """A point with its interval per run."""
    with style():
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, remains, loss in points:
            colour = colours[name]
            axis.vlines(100 * remains, loss.low, loss.high, color=colour, linewidth=2.2, alpha=0.45)
            axis.plot(100 * remains, loss.value, "o", color=colour, markersize=6)
            axis.annotate(
                name, (100 * remains, loss.value), xytext=(6, 3), textcoords="offset points", color=INK, fontsize=8
            )
        axis.invert_xaxis()
        axis.set_xlabel("% of the body that remains")
        axis.set_ylabel("held-out loss, nats per token")
    return figure


def _states(figure: Any) -> None:
    handles = [Patch(color=colour, label=state) for state, colour in STATES.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.0, borderaxespad=0.2)
