"""Confidence exits: a token is read at the first visited depth that is sure of it; what it skipped is made up for later.

Paper: Sorted LLaMA (arXiv 2309.08968) §4.3 and Table 2, thresholds on the largest probability. Differs: the paper does not say where the
keys and values of skipped blocks come from. Here a token that left waits at its depth, and when a later token goes deeper all that wait run
in the same pass. Skipped tokens are always the last ones, so what the deeper blocks then hold is what a full prefill would have made:
the text is that of a model that reads every token's own depth exactly, and waiting costs rows of a product, not passes.

Lossy by nature against the full model; `ExitStats` says how deep tokens went. Each visited depth costs a head, so few are visited.

Shapes: B rows, S tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.inference.request import Request, Tape
from sparsmith.inference.runner import DepthRunner
from sparsmith.inference.sampling import Sampler, confidence

MAX_WAITING = 64
"""Tokens that may wait before a pass is taken to full depth."""


@dataclass(frozen=True)
class ExitStats:
    """Where tokens were read."""

    depths: tuple[tuple[int, ...], ...]
    """Per row, per token up to and with its end token."""
    passes: dict[int, int]
    """Depth -> passes through the segment that ends there, the prompt's included."""
    agreement: float | None = None
    """Share of tokens that the full model, given the same text before, would have chosen; None where it was not asked for."""

    @property
    def histogram(self) -> dict[int, int]:
        """Depth -> tokens read there."""
        found = dict.fromkeys(self.passes, 0)
        for row in self.depths:
            for depth in row:
                found[depth] += 1
        return found

    @property
    def mean_depth(self) -> float:
        """In blocks, over all tokens."""
        counts = self.histogram
        return sum(depth * n for depth, n in counts.items()) / max(1, sum(counts.values()))

    def with_agreement(self, share: float) -> ExitStats:
        return replace(self, agreement=share)


@dataclass
class _Waiting:
    """Hidden states (B, S, D) that arrived at a segment's start and have not gone through."""

    states: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, state: Tensor) -> None:
        self.states.append(state)
        self.tokens += state.shape[1]

    def take(self, state: Tensor) -> Tensor:
        """All that wait, then `state`."""
        if not self.states:
            return state
        together = torch.cat([*self.states, state], dim=1)
        self.states.clear()
        self.tokens = 0
        return together


class EarlyExit:
    """One batch's generation. Use `exit_early`.

    Args:
        thresholds: depth -> (B,) largest probability from which a row's token is read there; above 1 = never.
        max_waiting: tokens that may wait before a pass is taken to full depth, whatever the exits say.
    """

    def __init__(
        self, model: nn.Module, request: Request, thresholds: dict[int, Tensor], max_waiting: int = MAX_WAITING
    ) -> None:
        layers = len(anatomy.blocks(model))
        open_at = sorted(depth for depth, t in thresholds.items() if depth < layers and bool((t <= 1).any()))
        self.request, self.max_waiting = request, max_waiting
        self.runner = DepthRunner(model, (*open_at, layers), mask=request.mask, room=request.room)
        self.thresholds = [thresholds[depth].to(self.runner.device) for depth in open_at]
        self.sampler = Sampler(request.sampling, range(request.rows), self.runner.device)
        self.tape = Tape(request)
        self.waiting = [_Waiting() for _ in self.runner.depths]
        self.passes = [1] * len(self.runner.depths)
        self._left_at: list[Tensor] = []

    def run(self) -> tuple[Tensor, ExitStats]:
        runner, tape, top = self.runner, self.tape, len(self.runner.depths) - 1
        last = runner.prefill(self.request.ids)[-1][:, -1]
        self._write(self.sampler.pick(runner.logits(top, last)), torch.full_like(tape.finished, top, dtype=torch.long))
        while not tape.done:
            self._write(*self._step())
        stats = ExitStats(self._depths(), dict(zip(runner.depths, self.passes, strict=True)))
        return tape.result(), stats

    def complete(self) -> None:
        """Take every waiting token to full depth: all blocks then hold the same tokens."""
        carried: Tensor | None = None
        for index, waiting in enumerate(self.waiting):
            if carried is not None:
                waiting.add(carried)
            if waiting.states:
                carried = self.runner.advance(index, torch.cat(waiting.states, dim=1)).hidden
                self.waiting[index] = _Waiting()

    def _write(self, tokens: Tensor, left_at: Tensor) -> None:
        self._left_at.append(left_at)
        self.tape.write(tokens[:, None])

    def _step(self) -> tuple[Tensor, Tensor]:
        """One token per row: (tokens (B,), index of the depth each was read at (B,))."""
        runner, top = self.runner, len(self.runner.depths) - 1
        uniform = None if self.sampler.greedy else self.sampler.uniforms()
        given, decided, tokens, left_at = self.tape.last, None, None, None
        forced = any(waiting.tokens >= self.max_waiting for waiting in self.waiting)
        for index in range(top + 1):
            arrived = runner.advance(index, given)
            self.passes[index] += 1
            if decided is None or not bool(decided.all()):
                logits = runner.logits(index, arrived.readable[:, -1])
                chosen = self.sampler.pick(logits, uniform)
                if index == top:
                    sure = torch.ones_like(self.tape.finished)
                else:
                    sure = (confidence(logits) >= self.thresholds[index]) | self.tape.finished
                if decided is None or tokens is None or left_at is None:
                    decided, tokens, left_at = sure, chosen, torch.full_like(chosen, index)
                else:
                    tokens = torch.where(decided, tokens, chosen)
                    left_at = left_at.masked_fill(~decided, index)
                    decided = decided | sure
            if index < top:
                if bool(decided.all()) and not forced:
                    self.waiting[index + 1].add(arrived.hidden)
                    break
                given = self.waiting[index + 1].take(arrived.hidden)
        assert tokens is not None and left_at is not None
        return tokens, left_at

    def _depths(self) -> tuple[tuple[int, ...], ...]:
        """Per row the depths of its tokens, up to and with its end token."""
        start = self.request.ids.shape[1]
        indices = torch.stack(self._left_at, dim=1)[:, : self.tape.length - start].tolist()
        answers = self.tape.tokens[:, start : self.tape.length].tolist()
        ends = set(self.request.eos)
        found = []
        for row, tokens in zip(indices, answers, strict=True):
            length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
            found.append(tuple(self.runner.depths[index] for index in row[:length]))
        return tuple(found)


def exit_early(
    model: nn.Module, request: Request, thresholds: dict[int, Tensor], *, max_waiting: int = MAX_WAITING
) -> tuple[Tensor, ExitStats]:
    """Ids (B, length), prompts included, and where tokens were read. The model must be in evaluation mode."""
    return EarlyExit(model, request, thresholds, max_waiting).run()


def agreement_of(model: nn.Module, request: Request, ids: Tensor, depths: tuple[tuple[int, ...], ...]) -> float:
    """Share of the answers' tokens in `ids` that are the full model's own first choice after the same text; one pass."""
    layers, start = len(anatomy.blocks(model)), request.ids.shape[1]
    runner = DepthRunner(model, (layers,), mask=request.mask, room=ids.shape[1])
    states = runner.prefill(ids[:, :-1])[-1][:, start - 1 :]
    own = runner.logits(0, states).argmax(dim=-1) == ids[:, start:]
    counted = [own[row, : len(left)] for row, left in enumerate(depths)]
    return torch.cat(counted).float().mean().item()
