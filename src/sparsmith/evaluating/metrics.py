"""The metrics by name: what to call them and which way is better."""

from __future__ import annotations

from collections.abc import Collection

METRICS: dict[str, tuple[str, bool]] = {
    "loss": ("held-out loss, nats per token", False),
    "accuracy": ("accuracy", True),
    "agreement": ("same token as the full depth", True),
    "exact_match": ("exact match", True),
    "finished": ("answers that end by themselves", True),
    "rank": ("rank accuracy", True),
    "rank_by_token": ("rank accuracy, per token", True),
    "rank_by_byte": ("rank accuracy, per byte", True),
    "rank_margin": ("rank margin, nats", True),
}
"""Metric -> (words, whether larger is better)."""
CLASS_LOSS = "held-out loss, nats per text"


def words(metric: str, measured: Collection[str] = ()) -> str:
    """What to call a metric; the loss of a classifier, which is measured with its accuracy, is one of texts and not of tokens."""
    return CLASS_LOSS if metric == "loss" and "accuracy" in measured else METRICS[metric][0]


NATS = ("loss", "rank_margin")
"""Metrics that are no shares."""
