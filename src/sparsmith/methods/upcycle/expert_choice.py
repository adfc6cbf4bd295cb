"""A mixture's blocks under expert choice: subclasses of the family's own modules, with the same weights under the same names and a
threshold per expert beside the router's.

Training takes each expert's best tokens of a row; what a token is given then depends on the tokens after it. Evaluation and generation
ask for each token alone whether its probability reaches the expert's threshold, a running mean of the smallest probability that the
expert took of a row, so no position sees a later one. A block without thresholds refuses to be evaluated.

This file is part of full checkpoints: it imports torch, the ops and the errors only.

Shapes: B rows, S tokens per row, T = B*S tokens, D hidden, E experts, N (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsmith.errors import NonCausalRouter
from sparsmith.ops.balance import several_ranks, sum_over_ranks, z_loss
from sparsmith.ops.expert_choice import above, followed, row_statistics, shares, tally, top_tokens, with_a_taker
from sparsmith.ops.route_context import RouteContext
from sparsmith.ops.routing import Routing
from sparsmith.ops.token_choice import jitter

TOP_C, THRESHOLD = "top_c", "threshold"
UNFITTED = -1.0
"""In the place of a threshold that no batch has set: probabilities are never below 0."""


@dataclass(frozen=True)
class ChoiceSettings:
    """Everything that the blocks need, as it stands in a checkpoint's config."""

    capacity_factor: float
    ema: float
    train_select: str = TOP_C
    jitter: float = 0.0
    z_coef: float = 0.0
    blocks: str = "model.layers"
    """Dotted path of the blocks in the base."""
    ffn: str = "mlp"
    experts: str = "experts"
    router: str = "gate"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChoiceSettings:
        """Strict: an unknown or missing key is an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys in `expert_choice`: {sorted(unknown)}")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class ChoiceContext(RouteContext):
    """A route context whose routings hold a (T, E) mask of takers in the place of indices, and what the thresholds follow."""

    pending: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    """block -> (its FFN, what its thresholds shall follow of the forwards since they last moved)"""
    tallies: dict[int, Tensor] = field(default_factory=dict)
    """block -> the sums of `tally` since the last reading"""

    def mask_of(self, like_TE: Tensor) -> Tensor | None:
        """(T,) bool, False = padding, of the forward that is open; None where nothing is known of these tokens."""
        mask = self.mask if self.open else None
        return mask.to(like_TE.device) if mask is not None and len(mask) == len(like_TE) else None

    def losses(self, norm: str, over_ranks: bool = False) -> dict[str, Tensor]:
        """`router_z` alone: the experts' loads are equal by their choice, so there is nothing to balance."""
        logits = [routing.logits for routing in self.layers.values() if routing.logits is not None]
        if not logits:
            return {}
        tokens = None
        if over_ranks and several_ranks():
            here = torch.tensor(len(logits[0]), device=logits[0].device) if self.mask is None else self.mask.sum()
            tokens = sum_over_ranks(here.to(logits[0].device)).clamp(min=1)
        losses = [
            z_loss(one, self.mask_of(one), None if tokens is None else tokens.to(one.device)).to(logits[0].device)
            for one in logits
        ]
        return {"router_z": torch.stack(losses).mean()}

    def _count(self, layer: int, indices_TK: Tensor, num_experts: int) -> None:
        self.count_taken(layer, indices_TK.float())

    def follow(self, ffn: Any, statistics: Tensor, counted: Tensor) -> None:
        """Keep what a block's thresholds shall follow, and its counts for the log."""
        _, before = self.pending.get(ffn.block, (ffn, None))
        self.pending[ffn.block] = (ffn, statistics if before is None else before + statistics)
        known = self.tallies.get(ffn.block)
        self.tallies[ffn.block] = counted if known is None else known + counted

    @torch.no_grad()
    def settle_thresholds(self) -> None:
        """Move the thresholds by what the forwards since have seen, the same on every rank. Not in the forward itself: a block that is
        computed again for its gradient must choose as it did."""
        if not self.pending:
            return
        blocks = sorted(self.pending)
        device = self.pending[blocks[0]][1].device
        all_rows = sum_over_ranks(torch.stack([self.pending[block][1].to(device) for block in blocks]))
        for block, statistics in zip(blocks, all_rows):
            ffn = self.pending[block][0]
            thresholds = ffn.choice_router().thresholds
            thresholds.copy_(followed(thresholds, statistics.to(thresholds.device), ffn.choice.ema))
        self.pending = {}

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """As the route context; first the thresholds take in the forward before, where no trainer of ours has let them."""
        self.settle_thresholds()
        super().begin(*args, **kwargs)

    def reset_window(self) -> None:
        super().reset_window()
        self.tallies = {}


class ChoiceRouter(nn.Module):
    """Mixed into a family's router: probabilities over all experts, in float32 or wider, and the experts' thresholds."""

    weight: nn.Parameter
    thresholds: Tensor
    jitter_amount: float

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(T, E) logits and probabilities."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training and self.jitter_amount:
                x_TD = jitter(x_TD, self.jitter_amount)
            logits_TE = functional.linear(x_TD.to(self.weight.dtype), self.weight)
            wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
            return wide_TE, wide_TE.softmax(dim=-1)


class ExpertChoice(nn.Module):
    """Mixed into a family's sparse FFN: the experts take the tokens."""

    choice: ChoiceSettings
    context: ChoiceContext
    block: int
    evaluates: str
    """`threshold`; `top_c` only while `seeing_ahead`."""
    shared_expert: Any
    shared_expert_gate: Any

    def choice_router(self) -> Any:
        return getattr(self, self.choice.router)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE, p_TE = self.choice_router()(x_TD)
        taken_TE = self._choose(p_TE, hidden_states.shape[0])
        weights_TE = shares(logits_TE, taken_TE)
        if self.training:
            self.context.record(self.block, Routing(logits_TE, taken_TE, weights_TE), taken_TE.shape[-1], True)
        token_N, expert_N = taken_TE.nonzero(as_tuple=True)
        experts = getattr(self, self.choice.experts)
        out_ND = experts(x_TD[token_N], expert_N[:, None], weights_TE[token_N, expert_N][:, None])
        y_TD = torch.zeros_like(x_TD).index_add(0, token_N, out_ND.to(x_TD.dtype))
        if hasattr(self, "shared_expert"):
            shared = self.shared_expert(x_TD)
            y_TD = y_TD + functional.sigmoid(self.shared_expert_gate(x_TD)) * shared
        return y_TD.view_as(hidden_states)

    @torch.no_grad()
    def _choose(self, p_TE: Tensor, rows: int) -> Tensor:
        """(T, E) bool, at least one expert for each token."""
        thresholds, context = self.choice_router().thresholds, self.context
        fitted = bool((thresholds >= 0).all())
        how = self.choice.train_select if self.training else self.evaluates
        if how == THRESHOLD and not self.training:
            if not fitted:
                raise NonCausalRouter(
                    f"expert choice in block {self.block}",
                    "no thresholds, as no batch was trained yet",
                    "an expert's threshold for each token: to choose among all tokens of a text would show it its own future",
                    "Train the model first; the thresholds are fitted from the first batch on.",
                )
            return with_a_taker(p_TE, above(p_TE, thresholds))
        mask_T = context.mask_of(p_TE)
        top = top_tokens(p_TE, rows, self.choice.capacity_factor, mask_T)
        if not self.training:
            return with_a_taker(p_TE, top.taken)
        by_threshold = above(p_TE, thresholds) if fitted else None
        first = by_threshold if how == THRESHOLD and by_threshold is not None else top.taken
        used = with_a_taker(p_TE, first)
        if context.open and self.block not in context.layers:
            rule = top.taken if first is by_threshold else by_threshold
            other = None if rule is None else with_a_taker(p_TE, rule)
            context.follow(self, row_statistics(top), tally(used, other, first, mask_T))
        return used


@cache
def _choosing(mixin: Any, family: Any) -> type:
    return type(f"{mixin.__name__}{family.__name__}", (mixin, family), {"__module__": __name__})


def let_experts_choose(base: Any, settings: ChoiceSettings, context: ChoiceContext) -> None:
    """Make every sparse FFN of a stock mixture one whose experts choose, in place. Thresholds that are there stay."""
    for index, ffn in choosers(base, settings):
        router = getattr(ffn, settings.router)
        if not isinstance(ffn, ExpertChoice):
            ffn.__class__ = _choosing(ExpertChoice, cast(Any, type(ffn)))
            router.__class__ = _choosing(ChoiceRouter, cast(Any, type(router)))
            weight = router.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            start = torch.full((len(weight),), UNFITTED, dtype=dtype, device=weight.device)
            router.register_buffer("thresholds", start)
        router.jitter_amount = settings.jitter
        ffn.choice, ffn.block, ffn.evaluates = settings, index, THRESHOLD
        object.__setattr__(ffn, "context", context)


def choosers(base: Any, settings: ChoiceSettings) -> list[tuple[int, Any]]:
    """(index, FFN) of the sparse blocks."""
    blocks = base
    for step in settings.blocks.split("."):
        blocks = getattr(blocks, step)
    found = ((index, getattr(block, settings.ffn)) for index, block in enumerate(blocks))
    return [(index, ffn) for index, ffn in found if hasattr(ffn, settings.experts)]


@contextmanager
def seeing_ahead(model: nn.Module) -> Iterator[None]:
    """Evaluate as in training, by each expert's best tokens of a row. For the proof that crafting leaves the function as it was, which
    runs before there are thresholds; never for text whose loss or continuation counts."""
    blocks = [module for module in model.modules() if isinstance(module, ExpertChoice)]
    for block in blocks:
        block.evaluates = TOP_C
    try:
        yield
    finally:
        for block in blocks:
            block.evaluates = THRESHOLD
