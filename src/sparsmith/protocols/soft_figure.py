"""The SoFT protocol's picture: held-out loss over depth, one line per arm, the seeds' spread as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from sparsmith.reporting.plots import WIDTH, colours_of, style

if TYPE_CHECKING:
    from sparsmith.protocols.soft import SoftComparison


def loss_by_depth(comparison: SoftComparison) -> Figure:
    """The tuned arms; the base is left out, as its losses would flatten all others."""
    rows = comparison.matrix()
    colours = colours_of(comparison.arms)
    with style():
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axis = figure.subplots()
        for arm in comparison.arms:
            mine = [row for row in rows if row["arm"] == arm]
            axis.errorbar(
                [row["depth"] for row in mine],
                [row["loss"] for row in mine],
                yerr=[row["sd"] or 0.0 for row in mine],
                color=colours[arm],
                marker="o",
                markersize=5,
                capsize=3,
                elinewidth=1.2,
                linestyle=(0, (1, 2)) if arm in comparison.after_sft else "-",
                label=arm,
            )
        axis.set_xticks(list(comparison.depths))
        axis.set_xlabel("depth, blocks")
        axis.set_ylabel("held-out loss, nats per token")
        figure.legend(loc="outside upper left", ncols=len(comparison.arms))
    return figure
