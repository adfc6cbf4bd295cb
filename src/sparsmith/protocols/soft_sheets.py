"""The tables of the SoFT protocol."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsmith.evaluating.metrics import METRICS, NATS
from sparsmith.evaluating.sheet import Sheet, signed

if TYPE_CHECKING:
    from sparsmith.protocols.soft import SoftComparison

_HIDDEN = ("rank_by_token", "rank_by_byte", "rank_margin")
"""Metrics that are in the JSON alone."""


def sheets(comparison: SoftComparison) -> list[Sheet]:
    """Loss, agreement, task metrics by depth; differences to the full SFT and at the same depth; cost."""
    matrix = {(row["arm"], row["depth"]): row for row in comparison.matrix()}
    found = [
        _by_depth(
            comparison,
            matrix,
            "Held-out loss by depth, nats per token (mean over domains and seeds, sd over seeds)",
            _loss,
        ),
        _by_depth(comparison, matrix, "Agreement with the arm's own full depth", _agreement),
    ]
    metrics = dict.fromkeys(metric for row in matrix.values() for metric in row["metrics"] if metric not in _HIDDEN)
    for metric in metrics:
        found.append(_by_depth(comparison, matrix, _title(metric), partial(_metric, metric)))
    found.append(
        _gaps(comparison, comparison.headline(), "Headline: loss minus that of the full SFT (below 0 = better)", False)
    )
    found.append(_gaps(comparison, comparison.diagonal(), "Diagonal: loss minus the rival's at the same depth", True))
    return [*(sheet for sheet in found if sheet.rows), _cost(comparison)]


def _title(metric: str) -> str:
    words = METRICS.get(metric, (metric, True))[0]
    return words[0].upper() + words[1:]


def _by_depth(comparison: SoftComparison, matrix: Any, title: str, cell: Callable[[Any], str]) -> Sheet:
    arms = ("base", *comparison.arms)
    marked = {row["arm"] for row in comparison.training() if not row["equal_training"]}
    rows = tuple(
        (
            arm + ("*" if arm in marked else ""),
            *(cell(matrix[arm, depth]) if (arm, depth) in matrix else "-" for depth in comparison.depths),
        )
        for arm in arms
    )
    notes = []
    if marked:
        notes.append("* unequal training: see the steps below.")
    if comparison.one_more:
        notes.append(f"Inner depths n of {', '.join(sorted(comparison.one_more))} have n + 1 blocks.")
    return Sheet(title, ("arm", *(f"depth {depth}" for depth in comparison.depths)), rows, " ".join(notes))


def _loss(row: Any) -> str:
    return f"{row['loss']:.4f}" + ("" if row["sd"] is None else f" ± {row['sd']:.4f}")


def _agreement(row: Any) -> str:
    return "-" if row["agreement"] is None else f"{row['agreement']:.1%}"


def _metric(metric: str, row: Any) -> str:
    value = row["metrics"].get(metric)
    if value is None:
        return "-"
    return f"{value:.3f}" if metric in NATS else f"{value:.1%}"


def _gaps(comparison: SoftComparison, records: list[dict[str, Any]], title: str, rival: bool) -> Sheet:
    """One row per arm (and rival), one column per depth, with the judge's tally where there is one."""
    pairs = list(dict.fromkeys((record["arm"], record["rival"]) for record in records))
    table = {(record["arm"], record["rival"], record["depth"]): record for record in records}
    rows = []
    for arm, other in pairs:
        cells = [_gap(table.get((arm, other, depth))) for depth in comparison.depths]
        rows.append((arm, other, *cells) if rival else (arm, *cells))
    heads = ("arm", "rival") if rival else ("arm",)
    caption = "95 % intervals over rows, paired within each seed" + (
        "; win/lose/tie (score) of a judge in both orders" if comparison.verdicts else ""
    )
    return Sheet(title, (*heads, *(f"depth {n}" for n in comparison.depths)), tuple(rows), caption, left=len(heads))


def _gap(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    text = signed(record["loss_difference"])
    if "judged" in record:
        won = record["judged"]
        text += f"; {won['wins']:g}/{won['losses']:g}/{won['ties']:g} ({won['score']:+.3f})"
    return text


def _cost(comparison: SoftComparison) -> Sheet:
    rows = tuple(
        (
            row["arm"],
            str(row["models"]),
            row["steps_shown"] + ("" if row["equal_training"] else " *"),
            f"{row['tokens']:,}",
            f"{row['trained']:,}",
            f"{row['extra']:,}",
            f"{row['flops']:.3g}",
            f"{row['flops_over_sft']:.2f}",
            f"{row['seconds']:.0f}",
        )
        for row in comparison.training()
    )
    heads = ("arm", "models", "steps", "tokens", "trained", "extra", "training FLOPs", "over SFT", "seconds")
    caption = (
        f"One seed of {len(comparison.seeds)}. FLOPs as planned; `a + b` steps: after a steps of SFT. "
        "* = not the same number of steps as SFT."
    )
    return Sheet("Cost", heads, rows, caption)
