"""Heat maps of expert load: blocks down, experts across.

Shape letters: G domains, L blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsmith.reporting.palette import INK, MUTED, difference_map, load_map
from sparsmith.reporting.plots import FONT, WIDTH, style


def load_by_layer(load_LE: Any, layers: Sequence[int] | None = None) -> Figure:
    """Share of the routed tokens that each expert took in each block, in percent."""
    load_LE = 100 * np.asarray(load_LE, dtype=float)
    with style():
        figure = Figure(figsize=_map_size(load_LE, 1), layout="constrained")
        axis = figure.subplots()
        even = 100 / load_LE.shape[1]
        top = max(2 * even, float(load_LE.max()))
        mesh = _map(axis, load_LE, load_map(), 0, top, layers, "{:.0f}")
        axis.set_ylabel("block")
        axis.set_xlabel("expert")
        bar = figure.colorbar(mesh, ax=axis, pad=0.015, aspect=18)
        _bar(bar, "% of the block's routed tokens")
        bar.ax.axhline(even, color=INK, linewidth=1.1)
        bar.ax.annotate(
            "even",
            (0, even),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=FONT - 1,
        )
    return figure


def load_by_domain(load_GLE: Any, domains: Sequence[str], layers: Sequence[int] | None = None) -> Figure:
    """Above, the load on the tokens of each domain; below, its distance from the mean of the domains. Percent and percentage points."""
    load_GLE = 100 * np.asarray(load_GLE, dtype=float)
    gap_GLE = load_GLE - load_GLE.mean(0, keepdims=True)
    reach = max(1.0, float(np.abs(gap_GLE).max()))
    top = max(200 / load_GLE.shape[2], float(load_GLE.max()))
    with style():
        figure = Figure(figsize=_map_size(load_GLE[0], len(domains), rows=2), layout="constrained")
        axes = figure.subplots(2, len(domains), squeeze=False, sharex=True, sharey=True)
        for column, domain in enumerate(domains):
            share = _map(axes[0, column], load_GLE[column], load_map(), 0, top, layers, "{:.0f}")
            gap = _map(axes[1, column], gap_GLE[column], difference_map(), -reach, reach, layers, "{:+.0f}")
            axes[0, column].set_title(domain)
            axes[1, column].set_xlabel("expert")
        axes[0, 0].set_ylabel("block")
        axes[1, 0].set_ylabel("block")
        _bar(figure.colorbar(share, ax=list(axes[0]), pad=0.015, aspect=18), "% of tokens")
        _bar(figure.colorbar(gap, ax=list(axes[1]), pad=0.015, aspect=18), "points from the mean")
    return figure


def _map_size(load_LE: np.ndarray, across: int, rows: int = 1) -> tuple[float, float]:
    """Cells as square as the column's width allows, never higher than half as much again as wide."""
    layers, experts = load_LE.shape
    width = min(WIDTH, 0.55 * experts * across + 1.9) if across == 1 else WIDTH
    cell = (width - 1.7) / (experts * across)
    return width, rows * (min(max(layers * min(cell, 0.42), 0.9), 7.5) + 0.45) + 0.3


def _map(
    axis: Axes, values_LE: np.ndarray, colours: Any, low: float, high: float, layers: Sequence[int] | None, form: str
) -> Any:
    count, experts = values_LE.shape
    mesh = axis.pcolormesh(
        values_LE, cmap=colours, vmin=low, vmax=high, edgecolors="white", linewidth=1.0 if values_LE.size <= 600 else 0
    )
    names = list(layers) if layers is not None else list(range(count))
    every_layer, every_expert = -(-count // 16), -(-experts // 16)
    axis.set_yticks(np.arange(0, count, every_layer) + 0.5, [str(names[i]) for i in range(0, count, every_layer)])
    axis.set_xticks(np.arange(0, experts, every_expert) + 0.5, [str(i) for i in range(0, experts, every_expert)])
    axis.set_ylim(count, 0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if experts <= 16 and count <= 16:
        for (layer, expert), value in np.ndenumerate(values_LE):
            dark = abs(value - (low + high) / 2) > 0.33 * (high - low) if low < 0 else value > low + 0.55 * (high - low)
            shown = "0" if abs(value) < 0.5 else form.format(value).replace("-", "\u2212")
            axis.text(
                expert + 0.5,
                layer + 0.5,
                shown,
                ha="center",
                va="center",
                fontsize=FONT - 2,
                color="white" if dark else INK,
            )
    return mesh


def _bar(bar: Any, label: str) -> None:
    bar.set_label(label, color=MUTED)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
