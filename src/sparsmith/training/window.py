"""Sums between two log lines, kept on the device so that a step needs no read-back."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sparsmith.ops.balance import several_ranks, sum_over_ranks


class Window:
    """Adds up what the objective returns; `take` turns it into figures and starts anew.

    Args:
        domains: names of the domains, in the order of their indices.
    """

    def __init__(self, domains: tuple[str, ...] = ()) -> None:
        self.domains = domains
        self.tokens_seen = 0
        self._clear()

    def _clear(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._domain_sum: Tensor | None = None
        self._domain_count: Tensor | None = None
        self._tokens: Tensor | None = None
        self._since = time.perf_counter()

    def add(self, outputs: dict[str, Any]) -> None:
        """One micro-batch."""
        for name, value in outputs["terms"].items():
            self._terms[name] = self._terms.get(name, torch.zeros_like(value)) + value
        tokens = outputs["tokens"]
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        if "domain_sum" in outputs:
            first = self._domain_sum is None or self._domain_count is None
            self._domain_sum = outputs["domain_sum"] if first else self._domain_sum + outputs["domain_sum"]
            self._domain_count = outputs["domain_count"] if first else self._domain_count + outputs["domain_count"]

    def take(self, steps: int) -> dict[str, Any]:
        """Means over the last `steps` optimiser steps, of all ranks together: every rank must take.

        Returns:
            `terms` {name: mean}, `domain_loss` {domain: nats per token}, `tokens_per_second`.
        """
        self._over_ranks()
        tokens = int(self._tokens.item()) if self._tokens is not None else 0
        self.tokens_seen += tokens
        figures: dict[str, Any] = {
            "terms": {name: value.item() / max(steps, 1) for name, value in self._terms.items()},
            "tokens_per_second": tokens / max(time.perf_counter() - self._since, 1e-9),
        }
        if self._domain_sum is not None and self._domain_count is not None:
            pairs = zip(self.domains, self._domain_sum.tolist(), self._domain_count.tolist(), strict=False)
            figures["domain_loss"] = {name: total / count for name, total, count in pairs if count}
        self._clear()
        return figures

    def _over_ranks(self) -> None:
        """One message with every sum; float64, which counts tokens exactly."""
        if self._tokens is None or not several_ranks():
            return
        parts = [*self._terms.values(), self._tokens]
        if self._domain_sum is not None and self._domain_count is not None:
            parts += [self._domain_sum, self._domain_count]
        sums = sum_over_ranks(torch.cat([value.detach().double().reshape(-1) for value in parts]))
        summed = [piece.view_as(value) for piece, value in zip(sums.split([v.numel() for v in parts]), parts)]
        self._terms = dict(zip(self._terms, summed))
        self._tokens = summed[len(self._terms)]
        if self._domain_sum is not None:
            self._domain_sum, self._domain_count = summed[-2:]
