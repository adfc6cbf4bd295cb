"""The metrics by name: what to call them and which way is better."""

from __future__ import annotations

METRICS: dict[str, tuple[str, bool]] = {
    "loss": ("held-out loss, nats per token", False),
    "agreement": ("same token as the full depth", True),
    "exact_match": ("exact match", True),
    "finished": ("answers that end by themselves", True),
    "rank": ("rank accuracy", True),
    "rank_by_token": ("rank accuracy, per token", True),
    "rank_by_byte": ("rank accuracy, per byte", True),
    "rank_margin": ("rank margin, nats", True),
}
"""Metric -> (words, whether larger is better)."""
NATS = ("loss", "rank_margin")
"""Metrics that are no shares."""
