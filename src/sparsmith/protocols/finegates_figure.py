"""The FineGates protocol's picture: quality over size, one line per arm, the seeds' spread as bars, the dense LoRA as a level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from sparsmith.reporting.plots import WIDTH, colours_of, style

if TYPE_CHECKING:
    from sparsmith.protocols.finegates import FineGatesComparison


def quality_by_size(comparison: FineGatesComparison) -> Figure:
    """Accuracy where it was measured, else the held-out loss."""
    from sparsmith.protocols.finegates import DENSE

    metric, rows = comparison.metric, comparison.table()
    colours = colours_of(comparison.arms)
    with style():
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axis = figure.subplots()
        for arm in comparison.arms:
            mine = [row for row in rows if row["arm"] == arm]
            values = [_value(row, metric) for row in mine]
            if arm == DENSE:
                axis.axhline(values[0][0], color=colours[arm], linestyle=(0, (1, 2)), label=f"{arm}, dense")
                continue
            axis.errorbar(
                [100 * row["remains"] for row in mine],
                [value for value, _ in values],
                yerr=[sd for _, sd in values],
                color=colours[arm],
                marker="o",
                markersize=5,
                capsize=3,
                elinewidth=1.2,
                label=arm,
            )
        axis.invert_xaxis()
        axis.set_xlabel("% of the body that remains")
        axis.set_ylabel("accuracy" if metric == "accuracy" else "held-out loss, nats per token")
        figure.legend(loc="outside upper left", ncols=len(comparison.arms))
    return figure


def _value(row: dict[str, Any], metric: str) -> tuple[float, float]:
    if metric == "loss":
        return row["loss"], row["sd"] or 0.0
    return row["metrics"][metric]["value"], row["metrics"][metric]["sd"] or 0.0
