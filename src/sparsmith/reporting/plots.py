"""The report's figures over steps and of intervals, each a function of plain data; usable on their own (`maps.py`: heat maps).

    figure = loss_curves({"pesc": {"maths": Curve(steps, losses)}})
    figure.savefig("loss.png"); text = svg(figure, "Loss by domain")

Figures are matplotlib objects without any global state (no pyplot, no backend to choose).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsmith.bootstrap import Figure as Measured
from sparsmith.reporting.palette import INK, LINE, MUTED, colour_of

WIDTH = 10.6  # inches, the width of the page's column
FONT = 9.5  # points
_STYLE: dict[str, Any] = {
    "font.size": FONT,
    "axes.titlesize": FONT + 0.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": FONT,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": FONT - 0.5,
    "ytick.labelsize": FONT - 0.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": FONT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsmith",
}


@dataclass(frozen=True)
class Curve:
    """A line over steps; `held_out` are points of it measured elsewhere."""

    steps: Sequence[float]
    values: Sequence[float]
    held_out: tuple[Sequence[float], Sequence[float]] = ((), ())


Curves = Mapping[str, Mapping[str, Curve]]
"""Panel -> run -> curve."""


def style() -> Any:
    """The report's matplotlib style, as a context."""
    return rc_context(_STYLE)  # type: ignore[arg-type]


def svg_file(figure: Figure) -> str:
    """The figure as the text of an SVG file that is the same for the same figures."""
    text = StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def svg(figure: Figure, label: str = "") -> str:
    """The figure as an SVG element for a page: no prologue, no metadata, as wide as its column."""
    text = StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z]+[a-zA-Z.]*_\d+"', "", body)
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", body)
    name = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    width = round(72 * figure.get_figwidth() * 4 / 3)
    head = f'<svg role="img" aria-label="{name}" width="{width}" viewBox'
    return re.sub(r"<svg [^>]*?viewBox", lambda _: head, body, count=1)


def curves(
    panels: Curves,
    *,
    ylabel: str,
    colours: Mapping[str, str],
    columns: int = 3,
    share_y: bool = False,
    from_zero: bool = False,
) -> Figure:
    """Small multiples over steps: one panel per name, one line per run; held-out points as markers."""
    columns = min(columns, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(WIDTH, 2.55 * rows + 0.35), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=share_y)
        for axis, (name, lines) in zip(axes.flat, panels.items()):
            _panel(axis, name, lines, colours, from_zero)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        for column in range(columns):
            axes[(len(panels) - 1 - column) // columns, column].set_xlabel("optimiser step")
            axes[(len(panels) - 1 - column) // columns, column].tick_params(labelbottom=True)
        figure.supylabel(ylabel, fontsize=FONT, color=MUTED)
        _legend(figure, panels, colours)
    return figure


def _panel(axis: Axes, name: str, lines: Mapping[str, Curve], colours: Mapping[str, str], from_zero: bool) -> None:
    for run, curve in lines.items():
        axis.plot(curve.steps, curve.values, color=colours[run], alpha=0.9, marker="o" if len(curve.steps) == 1 else "")
        steps, values = curve.held_out
        if len(steps):
            axis.plot(steps, values, color=colours[run], linestyle=(0, (1, 2)), linewidth=1.2)
            axis.plot(
                steps,
                values,
                color=colours[run],
                marker="o",
                markersize=5,
                linestyle="",
                markerfacecolor="white",
                markeredgewidth=1.6,
            )
    axis.set_title(name)
    axis.margins(x=0.02)
    axis.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    top = max((value for curve in lines.values() for value in curve.values), default=0)
    if from_zero or not top:
        axis.set_ylim(0, 1.08 * top or 1)


def _legend(figure: Figure, panels: Curves, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    runs = list(dict.fromkeys(run for lines in panels.values() for run in lines))
    handles = [Line2D([], [], color=colours[run], label=run) for run in runs] if len(runs) > 1 else []
    if any(len(curve.held_out[0]) for lines in panels.values() for curve in lines.values()):
        handles.append(Line2D([], [], color=MUTED, label="training rows"))
        handles.append(
            Line2D(
                [], [], color=MUTED, marker="o", markerfacecolor="white", linestyle=(0, (1, 2)), label="held-out rows"
            )
        )
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderaxespad=0.2)


def band(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]], colours: Mapping[str, str]
) -> Figure:
    """Load of the least and the most used expert over steps, 1 = even."""
    with style():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axis = figure.subplots()
        for run, (steps, low, high) in runs.items():
            axis.fill_between(steps, low, high, color=colours[run], alpha=0.16, linewidth=0)
            axis.plot(steps, low, color=colours[run], linewidth=1.3)
            axis.plot(steps, high, color=colours[run], linewidth=1.3, label=run)
        axis.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.annotate(
            "even load",
            (1, 1),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
        axis.set_ylim(bottom=0)
        axis.margins(x=0.01)
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axis.set_xlabel("optimiser step")
        axis.set_ylabel("share of tokens \u00d7 experts")
        if len(runs) > 1:
            figure.legend(loc="outside upper left", ncols=len(runs))
    return figure


def intervals(
    rows: Sequence[tuple[str, Mapping[str, Measured]]], *, xlabel: str, colours: Mapping[str, str], percent: bool
) -> Figure:
    """One line per domain, one dot with its interval per system."""
    systems = list(dict.fromkeys(name for _, figures in rows for name in figures))
    step = 0.62 / max(1, len(systems) - 1)
    with style():
        figure = Figure(
            figsize=(WIDTH / 2 - 0.1, 0.42 * len(rows) * max(1.0, len(systems) / 2.6) + 0.95), layout="constrained"
        )
        axis = figure.subplots()
        scale = 100 if percent else 1
        for row, (_, figures) in enumerate(rows):
            for place, name in enumerate(systems):
                if name not in figures:
                    continue
                shown, at = figures[name], row + (place - (len(systems) - 1) / 2) * step
                axis.plot(
                    [shown.low * scale, shown.high * scale], [at, at], color=colours[name], linewidth=2.2, alpha=0.45
                )
                axis.plot(
                    shown.value * scale,
                    at,
                    "o",
                    color=colours[name],
                    markersize=6,
                    clip_on=False,
                    label=name if row == 0 else None,
                )
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.tick_params(axis="y", labelcolor=INK)
        axis.set_ylim(len(rows) - 0.45, -0.55)
        axis.grid(axis="x")
        axis.grid(axis="y", visible=False)
        for edge in range(1, len(rows)):
            axis.axhline(edge - 0.5, color=LINE, linewidth=0.6)
        axis.spines["left"].set_visible(False)
        if percent:
            axis.set_xlim(0, max(5, axis.get_xlim()[1]))
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        figure.legend(
            *axis.get_legend_handles_labels(), loc="outside upper left", ncols=4, handletextpad=0.3, columnspacing=1.2
        )
    return figure


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each run, by its place."""
    return {name: colour_of(index) for index, name in enumerate(names)}
