"""Figures of a model that runs at many depths, each a function of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsmith.bootstrap import Figure as Measured
from sparsmith.reporting.palette import INK, LINE, MUTED
from sparsmith.reporting.plots import WIDTH, style

Profile = Mapping[int, Measured]
"""Depth in blocks -> a figure."""


@dataclass(frozen=True)
class Line:
    """A system over its depths."""

    values: Profile
    dashed: bool = False
    """True for what a run is compared with."""


def over_depths(
    panels: Mapping[str, Mapping[str, Line]], colours: Mapping[str, str], percent: Sequence[str] = ()
) -> Figure:
    """A panel per metric, a line with its intervals per system; `percent` names the panels that are shares."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(WIDTH if columns > 1 else 0.62 * WIDTH, 2.9 * rows + 0.35), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        handles: dict[str, Any] = {}
        for axis, (name, lines) in zip(axes.flat, panels.items()):
            for system, line in lines.items():
                handles.setdefault(system, _line(axis, line, colours[system], 100 if name in percent else 1))
            axis.set_title(name)
            _blocks(axis, [depth for line in lines.values() for depth in line.values])
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        if len(handles) > 1:
            figure.legend(handles.values(), handles, loc="outside upper left", ncols=5, borderaxespad=0.2)
    return figure


def _line(axis: Axes, line: Line, colour: str, scale: float) -> Any:
    depths = sorted(line.values)
    value, low, high = (
        [scale * getattr(line.values[depth], name) for depth in depths] for name in ("value", "low", "high")
    )
    axis.vlines(depths, low, high, color=colour, linewidth=2.2, alpha=0.35)
    (drawn,) = axis.plot(
        depths,
        value,
        color=colour,
        linestyle=(0, (4, 2)) if line.dashed else "-",
        marker="o",
        markersize=5.5,
        markerfacecolor="white" if line.dashed else colour,
    )
    return drawn


def _blocks(axis: Axes, depths: Sequence[int]) -> None:
    axis.set_xlabel("blocks that are run")
    axis.set_xticks(sorted(set(depths)))
    axis.margins(x=0.06)
    axis.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))


def shares(rows: Mapping[str, Mapping[int, int]], colours: Mapping[int, str]) -> Figure:
    """One bar per name, cut into the shares of tokens that left at each depth."""
    depths = sorted({depth for counts in rows.values() for depth in counts})
    with style():
        figure = Figure(figsize=(WIDTH, 0.46 * len(rows) + 0.95), layout="constrained")
        axis = figure.subplots()
        for place, counts in enumerate(rows.values()):
            left, total = 0.0, max(1, sum(counts.values()))
            for depth in depths:
                share = 100 * counts.get(depth, 0) / total
                if share:
                    axis.barh(place, share, left=left, height=0.62, color=colours[depth], edgecolor="white")
                    _share(axis, left + share / 2, place, share, colours[depth])
                left += share
        axis.set_yticks(range(len(rows)), list(rows))
        axis.tick_params(axis="y", labelcolor=INK)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("% of tokens")
        patches = [_patch(colours[depth], f"{depth} blocks") for depth in depths]
        figure.legend(handles=patches, loc="outside upper left", ncols=len(depths), handlelength=1.0, borderaxespad=0.2)
    return figure


def _share(axis: Axes, x: float, y: float, share: float, colour: str) -> None:
    if share >= 4:
        axis.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8.5, color=ink_on(colour))


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def ink_on(colour: str) -> str:
    """White or black, whichever reads better on a colour (WCAG contrast; never below 4.5)."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = float(linear @ [0.2126, 0.7152, 0.0722])
    return "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000000"


@dataclass(frozen=True)
class Point:
    """One way of running a model."""

    kind: str
    """`base`, `depth`, `drafts` or `exits`."""
    ms: float
    quality: float
    label: str


_MARKERS = {"base": "s", "depth": "o", "drafts": "D", "exits": "^"}
_WORDS = {
    "base": "base",
    "depth": "at one depth (blocks)",
    "drafts": "drafting for itself (depth:length)",
    "exits": "confidence exits (threshold)",
}
_FILLED = ("base", "depth")


def speed_and_quality(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], colours: Mapping[str, str], *, ylabel: str
) -> Figure:
    """A panel per way of measuring: time against loss, a colour per run, a marker per kind; depths are joined by a line in
    their order."""
    with style():
        figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (name, runs) in zip(axes, panels.items()):
            for run, points in runs.items():
                line = [p for p in points if p.kind == "depth"]
                axis.plot([p.ms for p in line], [p.quality for p in line], color=colours[run], linewidth=1.1, alpha=0.5)
            _mark(
                axis,
                [
                    (point, colours["base" if point.kind == "base" else run])
                    for run, points in runs.items()
                    for point in points
                ],
            )
            axis.set_title(name)
            axis.set_xlabel("ms per token")
            axis.margins(x=0.06, y=0.16)
            axis.grid(axis="x", color=LINE)
            axis.set_xlim(left=0)
        axes[0].set_ylabel(ylabel)
        figure.legend(handles=_legend(panels, colours), loc="outside upper left", ncols=5, columnspacing=1.3)
    return figure


def _mark(axis: Axes, points: Sequence[tuple[Point, str]]) -> None:
    """Markers with their labels; a label near others of its side moves on."""
    wide = max(point.ms for point, _ in points) or 1.0
    high = max(p.quality for p, _ in points) - min(p.quality for p, _ in points) or 1.0
    seen: list[tuple[bool, float, float]] = []
    for point, colour in sorted(points, key=lambda pair: pair[0].ms):
        axis.plot(
            point.ms,
            point.quality,
            _MARKERS[point.kind],
            color=colour,
            markersize=7,
            markerfacecolor=colour if point.kind in _FILLED else "white",
            markeredgewidth=1.5,
        )
        below = point.kind == "drafts"
        near = [
            place
            for place in seen
            if place[0] == below
            and abs(place[1] - point.ms) < 0.07 * wide
            and abs(place[2] - point.quality) < 0.12 * high
        ]
        seen.append((below, point.ms, point.quality))
        axis.annotate(
            point.label,
            (point.ms, point.quality),
            xytext=(0, (-1 if below else 1) * (8 + 11 * len(near))),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8.5,
            color=colour,
        )


def _legend(panels: Mapping[str, Mapping[str, Sequence[Point]]], colours: Mapping[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    runs = list(dict.fromkeys(run for found in panels.values() for run in found))
    kinds = {point.kind for found in panels.values() for points in found.values() for point in points}
    handles = [Line2D([], [], color=colours[run], label=run) for run in runs] if len(runs) > 1 else []
    for kind, marker in _MARKERS.items():
        if kind in kinds:
            filled = MUTED if kind in _FILLED else "white"
            handles.append(
                Line2D([], [], color=MUTED, marker=marker, markerfacecolor=filled, linestyle="", label=_WORDS[kind])
            )
    return handles
