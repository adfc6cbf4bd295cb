"""The FLAN-MoE protocol's picture: one panel per setup, a pair of bars for each pair of sides, the seeds' spread as error bars."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from sparsmith.protocols.cells import spread
from sparsmith.reporting.plots import WIDTH, colours_of, style

if TYPE_CHECKING:
    from sparsmith.protocols.flan_moe import FlanMoeComparison


def three_panels(comparison: FlanMoeComparison) -> Figure:
    """Held-out loss: of the tasks in setups 1 and 3, of the held-out sets in setup 2."""
    from sparsmith.protocols.flan_moe import SETUPS

    setups, sides = comparison.settings.setups, comparison.sides
    colours = colours_of(sides)
    with style():
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.subplots(1, len(setups), squeeze=False)[0]
        for axis, setup in zip(axes, setups):
            points = {side: loss_by_seed(comparison, side, setup) for side in sides}
            for place, side in enumerate(sides):
                values = points[side]
                if values:
                    axis.errorbar(
                        [place],
                        [statistics.fmean(values)],
                        yerr=[spread(values) or 0.0],
                        color=colours[side],
                        marker="o",
                        markersize=6,
                        capsize=4,
                        linestyle="none",
                        label=side if setup == setups[0] else None,
                    )
            axis.set_title(f"{setup}: {SETUPS[setup]}", fontsize=9)
            axis.set_xticks(range(len(sides)), sides, rotation=30, ha="right")
            axis.set_xlim(-0.5, len(sides) - 0.5)
        axes[0].set_ylabel("held-out loss, nats per token")
    return figure


def loss_by_seed(comparison: FlanMoeComparison, side: str, setup: int) -> list[float]:
    """Mean loss over the setup's sets, one figure per seed that has all of them."""
    names = comparison.heldout if setup == 2 else tuple(comparison.eval_of.values())
    found = []
    for seed in comparison.seeds:
        cells = [cell for cell in comparison.cells if (cell.side, cell.setup, cell.seed) == (side, setup, seed)]
        values = [cell.cell.result.sets[n]["loss"].value for cell in cells for n in names if n in cell.cell.result.sets]
        if len(values) == len(names):
            found.append(statistics.fmean(values))
    return found
