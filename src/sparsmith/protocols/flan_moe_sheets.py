"""The tables of the FLAN-MoE protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsmith.evaluating.sheet import Sheet, signed
from sparsmith.protocols import flan_moe_suites as suites

if TYPE_CHECKING:
    from sparsmith.protocols.flan_moe import FlanMoeComparison

_SHORT = {-1: "base", 1: "setup 1", 2: "setup 2", 3: "setup 3"}
_FORMS = {
    "loss": "{:.4f}",
    "rank": "{:.1%}",
    "rank_margin": "{:+.3f}",
    "exact_match": "{:.1%}",
    "normalised": "{:+.1f}",
}
_WORDS = {
    "loss": "Held-out response loss, nats per token",
    "rank": "Rank classification, share of rows right",
    "rank_margin": "Rank classification, margin of the right option in nats",
    "exact_match": "Exact match, share of rows",
    "normalised": "Rank classification, normalised score (0 = chance, 100 = all right)",
}


def sheets(comparison: FlanMoeComparison) -> list[Sheet]:
    """One table per metric, the gains, the cost."""
    found = [_metric(comparison, metric) for metric in _FORMS]
    last = [_gains(comparison.gains()), _cost(comparison)]
    if comparison.asked:
        last = [_suites(comparison), _gains(comparison.suite_gains(), "In the tasks of the harness: "), *last]
    if comparison.settings.task_learning_rates:
        last.append(_rates(comparison))
    return [*(sheet for sheet in found if sheet.rows), *last]


def _metric(comparison: FlanMoeComparison, metric: str) -> Sheet:
    records = [row for row in comparison.table() if metric in row["metrics"]]
    names = list(dict.fromkeys(row["set"] for row in records))
    table = {(row["side"], row["setup"], row["set"]): row["metrics"][metric] for row in records}
    keys = list(dict.fromkeys((row["side"], row["setup"]) for row in records))
    rows = tuple(
        (side, _SHORT[setup], *(_cell(table.get((side, setup, name)), metric) for name in names))
        for side, setup in keys
    )
    return Sheet(
        f"{_WORDS[metric]} (mean over seeds, sd over seeds)",
        ("side", "", *names),
        rows,
        "Setup 1: tuned on the task alone. 2: on the instruction mixture alone. 3: on the mixture, then on the task.",
        left=2,
    )


def _cell(figure: dict[str, Any] | None, metric: str) -> str:
    if figure is None:
        return "-"
    form = _FORMS[metric]
    text = form.format(figure["value"])
    return text if figure["sd"] is None else f"{text} ± {form.replace('+', '').format(figure['sd'])}"


def _gains(records: list[dict[str, Any]], of: str = "") -> Sheet:
    heads = list(dict.fromkeys(name for row in records for name in row["figures"]))
    rows = tuple(
        (row["sparse"], row["dense"], row["metric"], *(_signed(row["figures"].get(name)) for name in heads))
        for row in records
    )
    words = "sparse minus dense, and whether instruction tuning brings the sparse side more"
    return Sheet(
        of + (words if of else words.capitalize()),
        ("sparse", "dense", "metric", *heads),
        rows,
        "95 % intervals over rows, paired within each seed; in brackets each seed alone; ± half of a 95 % interval over the seeds "
        "(Student's t), which decides where the seeds disagree. A loss below 0, or a share above 0, is better for the sparse side. "
        "`gain` is (sparse after - sparse before) - (dense after - dense before).",
        left=3,
    )


def _suites(comparison: FlanMoeComparison) -> Sheet:
    records = suites.table(comparison.asked)
    names = [(task, metric) for task, metrics in records[0]["tasks"].items() for metric in metrics]
    rows = tuple(
        (
            row["side"],
            _SHORT[row["setup"]],
            *(_cell(row["tasks"][task][metric], "exact_match") for task, metric in names),
            _cell(row["average"], "normalised"),
        )
        for row in records
    )
    heads = ("side", "", *(f"{task}, {metric}" for task, metric in names), "normalised average")
    note = (
        "Share of rows right (mean over seeds, sd over seeds). The average is over the tasks, each by its first metric: "
        "0 = chance, 100 = all right."
    )
    return Sheet("Tasks of lm-evaluation-harness", heads, rows, note, left=2)


def _signed(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    each = ", ".join(f"{value:+.3f}" for value in figure["by_seed"].values())
    return signed(figure) if len(figure["by_seed"]) < 2 else f"{signed(figure)} [{each}] ±{figure['over_seeds']:.3f}"


def _cost(comparison: FlanMoeComparison) -> Sheet:
    reference = min(comparison.flops.values())
    rows = tuple(
        (
            row["side"],
            f"{row['total']:,}",
            f"{row['active']:,}",
            f"{row['training_flops_per_token']:,}",
            f"{row['training_flops_per_token'] / reference:.2f}",
            ", ".join(f"{setup}: {tokens:,}" for setup, tokens in row["tokens"].items()),
            f"{row['seconds']:.0f}",
        )
        for row in comparison.cost()
    )
    matched = {
        "tokens": "Matched by tokens: both sides of a pair saw the same rows in the same order. With two experts per token a mixture "
        "costs more FLOPs than its donor, so only a top-1 mixture, or one of narrower experts, is FLOP-matched as in the paper.",
        "flops": "Matched by training FLOPs: the dearer side took fewer steps of the same stream.",
    }
    heads = ("side", "parameters", "active", "training FLOPs/token", "x", "tokens by setup", "seconds")
    return Sheet("Size and cost", heads, rows, matched[comparison.settings.match])


def _rates(comparison: FlanMoeComparison) -> Sheet:
    rows = tuple(
        (
            row["side"],
            _SHORT[row["setup"]],
            row["task"],
            ", ".join(f"{s}: {rate:g}" for s, rate in row["rates"].items()),
        )
        for row in comparison.kept_rates()
    )
    tried = ", ".join(f"{rate:g}" for rate in comparison.settings.task_learning_rates)
    note = f"Tried for every side: {tried}; kept: the lowest loss on the task's validation rows."
    return Sheet("Learning rates kept, by seed", ("side", "", "task", "rates"), rows, note, left=4)
