"""What `bench` measured, for the terminal."""

from __future__ import annotations

from typing import Any


def bench_table(found: dict[str, Any]) -> Any:
    """A rich group of tables."""
    from rich.console import Group

    parts = [_speed(found)]
    if found["ways"]:
        parts.append(_ways(found))
    if found["calibration"]:
        parts.append(_calibration(found["calibration"]))
    parts += [f"written: {path}" for path in found["written"]]
    return Group(*parts)


def _speed(found: dict[str, Any]) -> Any:
    facts, rows = found["facts"], found["speed"]
    settings, batches = facts["settings"], list(rows[0]["ms_per_token"])
    threads = facts["machine"]["threads"]
    machine = f"{facts['device']}, {facts['dtype']}, {threads} thread{'s' if threads != 1 else ''}"
    quality = any("loss" in row for row in rows)
    table = _table(
        f"Speed of {facts['target']} on {machine}",
        "Median of {repeats}, quartiles in brackets; prompts of {context} tokens, {new_tokens} new ones. predicted: products per "
        "token over the full depth's.".format(**settings),
        ["", "blocks", "weights", "prefill tokens/s"]
        + [f"ms per token, batch {batch}" for batch in batches]
        + ["of full", "predicted"]
        + ["held-out loss"] * quality,
    )
    full = next(row for row in reversed(rows) if row["system"] == "tuned")["ms_per_token"]["1"]["value"]
    for row in rows:
        table.add_row(
            row["system"],
            str(row["depth"]),
            _size(row["weights_bytes"]),
            f"{row['prefill_tokens_per_second']['value']:,.0f}",
            *(_timing(row["ms_per_token"][batch]) for batch in batches),
            f"{row['ms_per_token']['1']['value'] / full:.3f}",
            f"{row['predicted_share']:.3f}",
            *([f"{row['loss']:.3f}" if "loss" in row else "-"] * quality),
        )
    return table


def _ways(found: dict[str, Any]) -> Any:
    rows = found["ways"]
    table = _table(
        f"Ways of writing, one prompt at a time, {found['facts']['prompts']} held-out prompts",
        "Prefill included. Drafts write the full model's text; exits do not, and agreement is the share of tokens that it would have "
        "written too.",
        [
            "",
            "ms per token",
            "tokens/s",
            "speed",
            "drafts that stood",
            "same text",
            "mean depth",
            "agreement",
            "held-out loss",
        ],
    )
    plain = rows[0]["ms_per_token"]["value"]
    for row in rows:
        table.add_row(
            row["name"],
            _timing(row["ms_per_token"]),
            f"{row['tokens_per_second']:.1f}",
            f"{plain / row['ms_per_token']['value']:.2f}x",
            _share(row.get("acceptance")),
            {True: "yes", False: "no", None: "-"}[row["same_text"]],
            f"{row['mean_depth']:.2f}" if "mean_depth" in row else "-",
            _share(row.get("agreement")),
            f"{row['loss']:.3f}" if "loss" in row else "-",
        )
    return table


def _calibration(calibration: dict[str, Any]) -> Any:
    table = _table(
        f"Thresholds for an agreement of {calibration['agreement']:g}",
        f"{calibration['tokens']} tokens of {calibration['prompts']} prompts; expected mean depth {calibration['mean_depth']:.2f} of "
        f"{calibration['layers']}. An exit above 1 is closed.",
        ["depth", "threshold", "tokens", "left here", "agreed", "lower bound"],
    )
    for row in calibration["exits"]:
        names = ("depth", "threshold", "tokens", "left", "agreed", "bound")
        table.add_row(*(f"{row[name]:g}" for name in names))
    return table


def _table(title: str, caption: str, heads: list[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    return table


def _timing(timing: dict[str, float]) -> str:
    return rf"{timing['value']:.3g} \[{timing['low']:.3g}, {timing['high']:.3g}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
