"""What the page shows of a model that gates cut to size: gates over the steps and by layer, what was folded, quality over size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsmith.bootstrap import Figure as Measured
from sparsmith.reporting import gate_plots, plots
from sparsmith.reporting.charts import Chart, chart, colours
from sparsmith.reporting.folder import Run
from sparsmith.reporting.plots import Curve
from sparsmith.reporting.words import percent

METHOD = "finegates"
KINDS = {
    "units": "FFN channels",
    "groups": "key-value groups",
    "heads": "query heads",
    "attention_block": "attention sub-blocks",
    "ffn_block": "FFN sub-blocks",
}


def table_of(run: Run) -> dict[str, Any]:
    """What the gates left in `tables.json`; {} for other runs."""
    return (run.tables or {}).get(METHOD) or {}


def over_time(runs: Sequence[Run]) -> Chart | None:
    """Share of open, soft and closed gates over the steps, a panel per run."""
    panels = {}
    for run in runs:
        steps, shares = _health(run, ("open", "soft", "closed"))
        if steps:
            panels[run.name] = (steps, shares)
    if not panels:
        return None
    caption = (
        "A gate is open where it lets all of its unit pass at test time, closed where it lets nothing pass, else soft. Settling makes them "
        "all open or closed."
    )
    return chart(gate_plots.shares_over_steps(panels), caption, "Gates over the steps")


def size_over_time(runs: Sequence[Run]) -> Chart | None:
    """Expected size against the controller's aim."""
    panels: dict[str, dict[str, Curve]] = {}
    shades = {}
    for run in runs:
        for name, tone in (("remains", plots.colours_of(["a"])["a"]), ("aim", "#5d6773")):
            steps, values = _health(run, (name,))
            if steps:
                panels.setdefault(run.name, {})[_SIZE[name]] = Curve(steps, values[name])
                shades[_SIZE[name]] = tone
    if not panels:
        return None
    caption = "Expected share of the base that remains, and the share that the budget asks for at that step. After settling it is a count."
    return chart(
        plots.curves(panels, ylabel="share that remains", colours=shades, columns=2, share_y=True),
        caption,
        "Size over the steps",
    )


_SIZE = {"remains": "expected size", "aim": "aim of the budget"}


def by_layer(run: Run) -> Chart | None:
    """What every layer keeps, by kind: open, soft, closed."""
    rows = {KINDS[kind]: table for kind, table in table_of(run).items() if kind in KINDS}
    if not rows:
        return None
    return chart(
        gate_plots.layers(rows), "Gates of every layer at the end of the run.", f"What every layer keeps: {run.name}"
    )


def folded(run: Run) -> Chart | None:
    """Histogram of the scales that settling multiplies into the weights."""
    bins = table_of(run).get("scales")
    if not bins:
        return None
    total = sum(count for *_, count in bins)
    caption = f"Values of the {total:,} gates that are kept, which settling folds into the weights; after that no gate is left."
    return chart(gate_plots.histogram(bins), caption, f"Folded scales: {run.name}")


def widths(run: Run) -> dict[str, Any] | None:
    """One row per layer: kept of all, by kind."""
    kinds = [kind for kind in table_of(run) if kind in KINDS]
    if not kinds:
        return None
    layers = len(table_of(run)[kinds[0]])
    rows = []
    for layer in range(layers):
        cells = [table_of(run)[kind][layer] for kind in kinds]
        rows.append([str(layer), *(f"{sum(cell[1:])} of {sum(cell)}" for cell in cells)])
    return {"title": "Kept by layer", "heads": ["block", *(KINDS[kind] for kind in kinds)], "rows": rows, "left": 1}


def quality_by_size(runs: Sequence[Run]) -> Chart | None:
    """Held-out loss over the share that remains, a point per run; only where several runs differ in size."""
    points = []
    for run in runs:
        remains, loss = remains_of(run), _loss(run)
        if remains is not None and loss is not None:
            points.append((run.name, remains, loss))
    if len(points) < 2:
        return None
    caption = "Held-out loss, mean of the domains, with 95 % intervals, over the share of the body that remains."
    return chart(gate_plots.quality(points, colours(runs)), caption, "Quality against size")


def remains_of(run: Run) -> float | None:
    """The share that a run has kept; 1 for the dense rival, None for runs of other methods."""
    mine = next((m for m in run.methods if m.get("method") == METHOD), None)
    if mine is None:
        return None
    if mine.get("baseline") == "lora":
        return 1.0
    _, found = _health(run, ("remains",))
    return found["remains"][-1] if found.get("remains") else None


def accounting(run: Run) -> dict[str, Any] | None:
    """The three ways to count, always together: counted, deletable, measured; each share says what it is of."""
    found = ((run.accounting or {}).get(METHOD) or {}).get("accounting")
    if not found:
        return None
    measured, whole = found["measured"], found["base"]["parameters"]
    rows = [
        [name, f"{found[name]['removed']:,}", percent(found[name]["share"], 1), found[name]["of"]]
        for name in ("counted", "deletable")
    ]
    gone = whole - measured["numbers"]
    rows.append(["measured, numbers in the files", f"{gone:,}", percent(gone / whole, 1), found["base"]["of"]])
    if "flops_share" in measured:
        less = measured["dense_flops_per_token"] - measured["flops_per_token"]
        of = f"the dense model's FLOPs per token at {measured['flops_context']} tokens"
        rows.append(["measured, FLOPs per token", f"{less:,}", percent(1 - measured["flops_share"], 1), of])
    return {
        "title": f"What was removed ({found['form']} form)",
        "heads": ["", "removed", "share", "of"],
        "rows": rows,
        "left": 1,
    }


def _loss(run: Run) -> Measured | None:
    raw = (((run.evaluation or {}).get("tuned") or {}).get("overall") or {}).get("loss")
    return Measured(**raw) if raw else None


def _health(run: Run, names: Sequence[str]) -> tuple[list[int], dict[str, list[float]]]:
    """Steps and series of the method's flat figures; only steps that have all of them."""
    keys = [f"{METHOD}/{name}" for name in names]
    points = [p for p in run.steps if all(key in p.get("health", {}) for key in keys)]
    return [p["step"] for p in points], {n: [p["health"][k] for p in points] for n, k in zip(names, keys)}
