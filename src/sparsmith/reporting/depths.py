"""What the page shows of a model that runs at many depths: asked of the run's files, so that any method with depths has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsmith.bootstrap import Figure as Measured
from sparsmith.reporting import depth_plots, plots
from sparsmith.reporting.charts import Chart, chart, colours
from sparsmith.reporting.depth_plots import Line, Point
from sparsmith.reporting.folder import Run
from sparsmith.reporting.palette import depth_colours
from sparsmith.reporting.plots import Curve
from sparsmith.reporting.words import UNIT, percent, size

LOSS_AT = re.compile(r".+/loss_at_(\d+)$")
"""Names of health figures that are losses of a depth."""

CONTROL = "control"
_COLOURS = {CONTROL: "#9a6a00"}


def depths_of(run: Run) -> list[int]:
    """Every depth that some file of the run names."""
    named = [*run.depths, *(run.exits or {}).get("depths", []), *(run.bench or {}).get("facts", {}).get("depths", [])]
    trained = [found[1] for point in run.steps for key in point.get("health", {}) if (found := LOSS_AT.match(key))]
    return sorted({int(depth) for depth in [*named, *trained]})


def training(runs: Sequence[Run]) -> Chart | None:
    """Loss of every depth over the steps, a panel per run; the held-out loss at the end as a marker."""
    panels: dict[str, dict[str, Curve]] = {}
    shades: dict[str, str] = {}
    for run in runs:
        tones = depth_colours(depths_of(run))
        for depth, tone in tones.items():
            found = [(p["step"], v) for p in run.steps for k, v in p.get("health", {}).items() if _is(k, depth)]
            end = _figure(run.depths.get(str(depth)), "loss")
            if found:
                last = ([found[-1][0]], [end.value]) if end else ([], [])
                curve = Curve([s for s, _ in found], [v for _, v in found], held_out=last)
                panels.setdefault(run.name, {})[f"{depth} blocks"] = curve
                shades.setdefault(f"{depth} blocks", tone)
    if not panels:
        return None
    figure = plots.curves(panels, ylabel="loss, nats per answer token", colours=shades, columns=2, share_y=True)
    caption = "Lighter lines are shallower. A gap that stays open at the end is what a depth cannot do, or has not yet learned."
    return chart(figure, caption, "Loss of every depth while tuning")


def _is(key: str, depth: int) -> bool:
    found = LOSS_AT.match(key)
    return found is not None and int(found[1]) == depth


def measured(runs: Sequence[Run]) -> Chart | None:
    """Every metric over the depths, a line per run, the control of the first run beside it."""
    systems: dict[str, tuple[Mapping[str, Any], bool]] = {run.name: (run.depths, False) for run in runs if run.depths}
    if not systems:
        return None
    if len(runs) == 1 and runs[0].control_depths:
        systems = {CONTROL: (runs[0].control_depths, True), **systems}
    panels: dict[str, dict[str, Line]] = {}
    shares = []
    for key, fact in _facts(systems).items():
        title = _TITLES.get(key, str(fact["title"]).split(",")[0])
        percent_, unit = fact["unit"] == "share", ", %" if fact["unit"] == "share" else ", nats"
        for name, (results, dashed) in systems.items():
            values = {int(n): f for n, result in results.items() if (f := _figure(result, key))}
            if len(values) > 1:
                panels.setdefault(title + unit, {})[name] = Line(values, dashed)
        shares += [title + unit] if percent_ else []
    figure = depth_plots.over_depths(panels, {**colours(runs), **_COLOURS}, shares)
    caption = (
        "Held-out rows, mean of the domains, with 95 % intervals. Agreement is the share of answer tokens at which a depth's first choice "
        "is the full depth's."
    )
    if CONTROL in systems:
        caption += " The control was tuned on the same rows with the loss of the full depth alone, and is read out at the same depths."
    return chart(figure, caption, "Held-out figures by depth")


_TITLES = {
    "loss": "Held-out loss",
    "agreement": "Agreement with the full depth",
    "exact_match": "Exact match",
    "rank": "Rank accuracy",
}


def _facts(systems: Mapping[str, tuple[Mapping[str, Any], bool]]) -> dict[str, dict[str, Any]]:
    """Metric -> its title and unit, of those worth a panel."""
    found: dict[str, dict[str, Any]] = {}
    for results, _ in systems.values():
        for result in results.values():
            found.update({key: fact for key, fact in (result.get("metrics") or {}).items() if key in _SHOWN})
    return {key: found[key] for key in _SHOWN if key in found}


_SHOWN = ("loss", "agreement", "exact_match", "rank")


def _figure(result: Mapping[str, Any] | None, metric: str) -> Measured | None:
    raw = ((result or {}).get("overall") or {}).get(metric)
    return Measured(**raw) if raw else None


def table(run: Run) -> dict[str, Any] | None:
    """The figures by depth in numbers; the plot's alternative in text."""
    if not run.depths:
        return None
    facts = _facts({"": (run.depths, False)})
    heads = ["blocks", *(_TITLES.get(key, fact["title"]) for key, fact in facts.items())]
    rows = []
    for depth in sorted(map(int, run.depths)):
        found = [_figure(run.depths[str(depth)], key) for key in facts]
        shown = [_words(figure, fact["unit"]) for figure, fact in zip(found, facts.values())]
        rows.append([str(depth), *shown])
    return {"title": "The same in numbers", "heads": heads, "rows": rows, "left": 1}


def _words(figure: Measured | None, unit: str) -> str:
    if figure is None:
        return "–"
    if unit == "share":
        return f"{percent(figure.value)} ({100 * figure.low:.1f} – {100 * figure.high:.1f})"
    return f"{figure.value:.3f} ({figure.low:.3f} – {figure.high:.3f})"


def exits(run: Run) -> dict[str, Any] | None:
    """Where tokens left: the histogram of every policy, and some answers token by token."""
    found = run.exits
    if not found:
        return None
    tones = depth_colours(found["depths"])
    rows = {name: {int(n): count for n, count in counts.items()} for name, counts in found["histograms"].items()}
    limits = {int(n): limit for n, limit in found["thresholds"].items()}
    told = ", ".join(f"{n}: {limit:g}" if limit <= 1 else f"{n}: closed" for n, limit in sorted(limits.items()))
    caption = (
        f"Share of the written tokens that were read at each depth, over all prompts measured. The first token of an answer is always "
        f"read at {found['layers']} blocks."
    )
    return {
        "chart": chart(depth_plots.shares(rows, tones), caption, "Tokens by the depth they left at"),
        "shown": found["shown"],
        "thresholds": told,
        "mean": f"{found['mean_depth']:.2f} of {found['layers']}",
        "agreement": percent(found["agreement"]),
        "tones": tones,
        "prompts": [
            {"prompt": one["prompt"].strip(), "tokens": _marked(one["tokens"], tones)} for one in found["prompts"]
        ],
    }


def _marked(tokens: Sequence[Sequence[Any]], tones: Mapping[int, str]) -> list[dict[str, Any]]:
    """Tokens with their tone; the depth is written out where it changes, so that nobody needs the colour."""
    found, before = [], None
    for text, depth in tokens:
        found.append({"text": text, "depth": depth, "tone": tones[depth], "new": depth != before})
        before = depth
    return found


def speed_and_quality(runs: Sequence[Run]) -> Chart | None:
    """Milliseconds per token against held-out loss, of every run that was measured."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for run in runs:
        bench = run.bench or {"ways": [], "speed": []}
        ways, speed = _way_points(bench), _speed_points(bench)
        if ways:
            panels.setdefault("Held-out prompts, prefill included", {})[run.name] = ways
        elif speed:
            panels.setdefault("Random prompts of one length, decode alone", {})[run.name] = speed
    if not panels:
        return None
    caption = (
        "Down and to the left is better: faster, and a lower held-out loss. Drafts write the full depth's text and stand at its loss; "
        "exits stand at the loss of the mixture of depths that they read tokens at."
    )
    if len(panels) > 1:
        caption += " The panels differ in what is timed: compare points of one panel."
    figure = depth_plots.speed_and_quality(panels, colours(runs), ylabel="held-out loss, nats per answer token")
    return chart(figure, caption, "Speed against quality, one prompt at a time")


def _speed_points(bench: Mapping[str, Any]) -> list[Point]:
    kinds = {"base": "base", "tuned": "depth"}
    return [
        Point(
            kinds[row["system"]],
            row["ms_per_token"]["1"]["value"],
            row["loss"],
            "base" if row["system"] == "base" else str(row["depth"]),
        )
        for row in bench["speed"]
        if "loss" in row
    ]


_KINDS = {"plain": "depth", "depth": "depth", "speculation": "drafts", "exits": "exits"}


def _way_points(bench: Mapping[str, Any]) -> list[Point]:
    """Ways over the held-out prompts; of the drafts of a depth the fastest, so that labels stay apart."""
    found: dict[str, Point] = {}
    for way in bench["ways"]:
        if "loss" not in way:
            continue
        kind, label = _KINDS[way["kind"]], way["name"].split()[-1]
        if way["kind"] == "plain":
            label = str(bench["facts"]["layers"])
        elif "calibrated" in way["name"]:
            label = f"calibrated {label}"
        point = Point(kind, way["ms_per_token"]["value"], way["loss"], label)
        key = f"{kind} {label.split(':')[0]}"
        if key not in found or point.ms < found[key].ms:
            found[key] = point
    shallow_first = sorted((p for p in found.values() if p.kind == "depth"), key=lambda p: int(p.label))
    return [*shallow_first, *(p for p in found.values() if p.kind != "depth")]


def speed_tables(run: Run) -> list[dict[str, Any]]:
    """The bench in numbers."""
    if not run.bench:
        return []
    return [_speed_table(run.bench), *([_way_table(run.bench)] if run.bench["ways"] else [])]


def _speed_table(bench: Mapping[str, Any]) -> dict[str, Any]:
    batches = list(bench["speed"][0]["ms_per_token"])
    tuned = [row for row in bench["speed"] if row["system"] == "tuned"]
    full = tuned[-1]["ms_per_token"]["1"]["value"]
    heads = ["", "blocks", "weights", "prefill, tokens/s", *(f"ms per token, batch {b}" for b in batches)]
    rows = [
        [
            row["system"],
            str(row["depth"]),
            size(row["weights_bytes"]),
            f"{row['prefill_tokens_per_second']['value']:,.0f}".replace(",", "\u202f"),
            *(f"{row['ms_per_token'][batch]['value']:.3g}" for batch in batches),
            f"{row['ms_per_token']['1']['value'] / full:.2f}",
            f"{row['predicted_share']:.2f}",
        ]
        for row in bench["speed"]
    ]
    threads = bench["facts"]["machine"]["threads"]
    machine = (
        f"{bench['facts']['device']}, {bench['facts']['dtype']}, {threads}{UNIT}thread{'s' if threads != 1 else ''}"
    )
    title = f"Speed on {machine}"
    return {"title": title, "heads": [*heads, "of full", "predicted"], "rows": rows, "left": 1}


def _way_table(bench: Mapping[str, Any]) -> dict[str, Any]:
    plain = bench["ways"][0]["ms_per_token"]["value"]
    rows = [
        [
            way["name"],
            f"{way['ms_per_token']['value']:.3g}",
            f"{plain / way['ms_per_token']['value']:.2f}{UNIT}×",
            percent(way["acceptance"]) if "acceptance" in way else "–",
            f"{way['mean_depth']:.2f}" if "mean_depth" in way else "–",
            percent(way["agreement"]) if "agreement" in way else "–",
            {True: "yes", False: "no", None: "–"}[way["same_text"]],
        ]
        for way in bench["ways"]
    ]
    heads = ["", "ms per token", "speed", "drafts that stood", "mean depth", "agreement", "text of the full depth"]
    title = f"Ways of writing, over {bench['facts']['prompts']} held-out prompts"
    return {"title": title, "heads": heads, "rows": rows, "left": 1}


def guard(run: Run) -> dict[str, Any] | None:
    """The full model beside the base and its control, with the verdict."""
    found = run.guard
    if not found:
        return None
    metrics = [key for key in found["rows"][-1]["metrics"] if key in found["differences"] and key in _SHOWN]
    rows = [
        {
            "name": _NAMES.get(row["name"], row["name"]),
            "key": row["name"],
            "cells": [_cell(row["loss"], "nats"), *(_cell(row["metrics"].get(key), "share") for key in metrics)],
            "tokens": row["tokens"],
            "steps": row["steps"],
        }
        for row in found["rows"]
        if not (row["name"] == CONTROL and found["control"] is None)
    ]
    against = "base" if found["control"] is None else CONTROL
    gaps = [_cell(found["difference"], "nats", sign=True)]
    gaps += [_cell(found["differences"][key], "share", sign=True) for key in metrics]
    return {
        "heads": ["Held-out loss, nats", *(_TITLES.get(key, key.replace("_", " ")) for key in metrics)],
        "rows": rows,
        "gaps": gaps,
        "against": against,
        "limit": f"{found['limit']:.3g}",
        "gap": f"{found['difference']['value']:+.4f}".replace("-", "\u2212"),
        "passed": bool(found["passed"]),
    }


_NAMES = {
    "base": "base, as it came",
    CONTROL: "control: the same rows, the full depth's loss alone",
    "tuned": "this run",
}


def _cell(raw: Mapping[str, Any] | None, unit: str, sign: bool = False) -> tuple[str, str]:
    """(value, interval)."""
    if raw is None:
        return "–", ""
    scale, digits = (100, 1) if unit == "share" else (1, 4)
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    value, low, high = (form.format(scale * raw[key]).replace("-", "\u2212") for key in ("value", "low", "high"))
    tail = (f"{UNIT}points" if sign else f"{UNIT}%") if unit == "share" else ""
    return value + tail, f"{low} {'to' if sign else '–'} {high}"
