"""How much of the model runs per token: the flags of `sparsmith generate` that choose one way, as values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparsmith.errors import UsageError

CALIBRATED = "calibrated"
"""The word that takes the thresholds which `sparsmith bench RUN --calibrate` wrote."""


def one_mode(
    depth: int | None,
    budget: str | None,
    exit_threshold: str | None,
    self_speculative: str | None,
    *,
    visit: str | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """The chosen way and its settings as `app.generate` takes them; {} for the whole model.

    Raises:
        UsageError: two ways, a setting of another way, or a value that cannot be read.
    """
    ways = {
        "--depth": depth,
        "--budget": budget,
        "--exit-threshold": exit_threshold,
        "--self-speculative": self_speculative,
    }
    asked = [flag for flag, value in ways.items() if value is not None]
    if len(asked) > 1:
        raise UsageError(" and ".join(asked), "both", "one way of generating", f"Keep {asked[0]} or {asked[1]}.")
    milliseconds = budget is not None and budget.strip().endswith("ms")
    if visit is not None and exit_threshold is None:
        raise UsageError("--visit", f"`{visit}`, which has no effect here", "--exit-threshold beside it", "Add it.")
    if profile is not None and not milliseconds:
        mend = "Write the budget as 12ms, or drop --profile."
        raise UsageError("--profile", f"`{profile}`, which has no effect here", "--budget in milliseconds", mend)
    if depth is not None:
        return {"depth": depth}
    if budget is not None:
        return {"budget": _budget(budget), **({"profile": profile} if profile is not None else {})}
    if exit_threshold is not None:
        shown = {"visit": _depths("--visit", visit)} if visit is not None else {}
        return {"exit_threshold": _threshold(exit_threshold), **shown}
    return {"self_speculative": _speculation(self_speculative)} if self_speculative is not None else {}


def _budget(text: str) -> float | str:
    """A share of the compute, or milliseconds as the engine reads them."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*ms\s*", text):
        return text.strip()
    share = _number(text)
    if share is None or not 0 < share <= 1:
        raise UsageError("--budget", f"`{text}`", "a share of the compute in (0, 1], or `12ms` per token", "Mend it.")
    return share


def _threshold(text: str) -> float | dict[int, float] | str:
    """A probability, one per depth, the word `calibrated`, or a file's path."""
    if text == CALIBRATED:
        return text
    number = _number(text)
    if number is not None and number > 0:
        return number
    if re.fullmatch(r"\d+:[\d.]+(,\d+:[\d.]+)*", text):
        pairs = [pair.split(":") for pair in text.split(",")]
        found = {int(depth): _number(value) for depth, value in pairs}
        if all(value for value in found.values()):
            return {depth: value for depth, value in found.items() if value is not None}
    elif number is None and _is_there(text):
        return text
    raise UsageError(
        "--exit-threshold",
        f"`{text}`",
        f"a probability, depths as 2:0.9,4:0.8, `{CALIBRATED}`, or a file of thresholds",
        "Mend the value, or write thresholds with `sparsmith bench RUN --calibrate 0.98`.",
    )


def _speculation(text: str) -> dict[str, int]:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if found is None:
        expected = "the depth that drafts, and tokens per draft: 2 or 2:4"
        raise UsageError("--self-speculative", f"`{text}`", expected, "Write --self-speculative 2:4.")
    exit, draft_len = found.groups()
    return {"exit": int(exit), **({"draft_len": int(draft_len)} if draft_len else {})}


def _depths(flag: str, text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageError(flag, f"`{text}`", "depths in blocks, comma-separated: 2,3", f"Write {flag} 2,3.")
    return [int(depth) for depth in text.split(",")]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False
