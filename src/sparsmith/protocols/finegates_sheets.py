"""The tables of the FineGates protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsmith.evaluating.metrics import METRICS
from sparsmith.evaluating.sheet import Sheet, signed

if TYPE_CHECKING:
    from sparsmith.protocols.finegates import FineGatesComparison

_HIDDEN = ("rank_by_token", "rank_by_byte", "rank_margin", "finished")


def sheets(comparison: FineGatesComparison) -> list[Sheet]:
    """Quality by size, differences to every rival, cost."""
    found = [_quality(comparison, "loss")]
    for metric in comparison.cells[0].cell.result.overall:
        if metric not in ("loss", *_HIDDEN):
            found.append(_quality(comparison, metric))
    for metric in dict.fromkeys(("loss", comparison.metric)):
        found.append(_gaps(comparison, metric))
    return [*(sheet for sheet in found if sheet.rows), _cost(comparison)]


def _quality(comparison: FineGatesComparison, metric: str) -> Sheet:
    records = {(row["arm"], row["target"]): row for row in comparison.table()}
    sizes = ((1.0,) if any(row["target"] == 1 for row in comparison.table()) else ()) + comparison.targets
    rows = tuple((arm, *(_cell(records.get((arm, size)), metric) for size in sizes)) for arm in comparison.arms)
    words = METRICS.get(metric, (metric, True))[0]
    title = f"{words[0].upper()}{words[1:]} by the share that remains (mean over domains and seeds, sd over seeds)"
    left = [row["remains"] for row in comparison.table() if row["target"] < 1]
    caption = "" if not left else "Heads are the targets; what really remains stands in the cost table."
    return Sheet(title, ("arm", *(f"{size:.0%}" for size in sizes)), rows, caption)


def _cell(row: dict[str, Any] | None, metric: str) -> str:
    if row is None:
        return "-"
    if metric == "loss":
        value, sd, form = row["loss"], row["sd"], "{:.4f}"
    else:
        value, sd, form = row["metrics"][metric]["value"], row["metrics"][metric]["sd"], "{:.1%}"
    return form.format(value) + ("" if sd is None else " ± " + form.format(sd))


def _gaps(comparison: FineGatesComparison, metric: str) -> Sheet:
    gaps = [gap for gap in comparison.gaps() if gap["metric"] == metric]
    pairs = list(dict.fromkeys((gap["arm"], gap["rival"]) for gap in gaps))
    table = {(gap["arm"], gap["rival"], gap["target"]): gap for gap in gaps}
    rows = tuple(
        (arm, rival, *(_gap(table.get((arm, rival, target))) for target in comparison.targets)) for arm, rival in pairs
    )
    better = "below" if metric == "loss" else "above"
    return Sheet(
        f"Learned minus rival, {metric} ({better} 0 = learned gates are better)",
        ("arm", "rival", *(f"{target:.0%}" for target in comparison.targets)),
        rows,
        "95 % intervals over rows, paired within each seed; in brackets the seeds one by one",
        left=2,
    )


def _gap(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return "-"
    each = ", ".join(f"{value:+.3f}" for value in gap["by_seed"])
    return f"{signed(gap['difference'])} [{each}]"


def _cost(comparison: FineGatesComparison) -> Sheet:
    rows = tuple(
        (
            row["arm"],
            f"{row['target']:.0%}",
            f"{row['remains']:.1%}",
            f"{row['trained']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.0f}",
        )
        for row in comparison.table()
    )
    heads = ("arm", "target", "remains", "trained", "tokens", "seconds")
    return Sheet("Size and cost", heads, rows, f"One seed of {len(comparison.seeds)}; seconds of training.")
