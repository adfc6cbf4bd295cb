"""Self-speculation: the first blocks draft, the others verify, over one shared set of keys and values.

Paper: Sorted LLaMA (arXiv 2309.08968) §4 drafts with a sub-model by a process that is lossy in its tables; here verification is exact
(arXiv 2211.17192): greedy text is the full model's, a draw follows its law.

Invariant between rounds: every block holds keys and values of all emitted tokens but the last. A round runs K tokens through blocks 1..n,
one by one, keeps the states, and runs blocks n+1..N once over them: K c + (1 - c) of a full pass, c = cost of the first n blocks and the
head. With the *bonus* token the last draft goes through the first blocks too, for one more token when all are right: K c + 1.

Rows of a batch advance together by the shortest accepted prefix + 1: a stopping rule, so every row stays exact.

Shapes: B rows, K drafted tokens, M = K or K + 1 verified states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.errors import MethodError, UsageError, nearest
from sparsmith.inference.budget import depth_fraction
from sparsmith.inference.request import Request, Tape
from sparsmith.inference.runner import DepthRunner
from sparsmith.inference.sampling import Sampler, confidence
from sparsmith.ops.speculation import accepted, agreeing_prefix, draw, residual


@dataclass(frozen=True, kw_only=True)
class SelfSpeculation:
    """Settings of `self_speculative=`."""

    exit: int
    """Depth of the draft, in blocks: 1 to N-1."""
    draft_len: int = 4
    """Tokens drafted per round, at most."""
    stop_confidence: float = 0.4
    """Drafting stops behind a token whose largest probability is below this; 0 = never, which saves a wait for the device."""
    bonus: bool | Literal["auto"] = "auto"
    """Run the last draft through the first blocks too; auto = where the measured acceptance makes it pay."""

    @classmethod
    def of(cls, given: Any, layers: int) -> SelfSpeculation:
        """From settings, a mapping or a bare exit.

        Raises:
            UsageError, MethodError: an unknown key, or a value that cannot be.
        """
        if isinstance(given, int) and not isinstance(given, bool):
            given = {"exit": given}
        if isinstance(given, Mapping):
            names = tuple(cls.__dataclass_fields__)
            unknown = [key for key in given if key not in names]
            if unknown or "exit" not in given:
                raise UsageError(
                    "self_speculative",
                    f"`{unknown[0]}`" if unknown else "no `exit`",
                    "exit, draft_len, stop_confidence, bonus",
                    nearest(str(unknown[0]), names) if unknown else "Name the depth that drafts.",
                )
            given = cls(**given)
        if not isinstance(given, cls):
            raise UsageError("self_speculative", repr(given), "settings or the depth of the draft", "Give {'exit': n}.")
        if not 1 <= given.exit < layers:
            raise MethodError("self_speculative.exit", f"{given.exit}", f"1 to {layers - 1}", "Draft below full depth.")
        if given.draft_len < 1 or given.bonus not in (True, False, "auto"):
            wrong = "draft_len" if given.draft_len < 1 else "bonus"
            found = repr(getattr(given, wrong))
            raise UsageError(
                f"self_speculative.{wrong}", found, "draft_len >= 1; bonus true, false or auto", "Mend it."
            )
        return given


@dataclass(frozen=True)
class SpeculationStats:
    """Counts over the whole batch; passes are of the batch."""

    exit: int
    rounds: int
    drafted: int
    accepted: int
    rejected: int
    early_passes: int
    """Passes through the first blocks, the prompt's included."""
    full_passes: int
    """Passes through the last blocks, the prompt's included."""
    emitted: int
    """Tokens written per row, at most."""

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stood."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class _Counts:
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    right: int = 0
    """Sum over rounds of the batch's shortest accepted prefix."""
    judged: int = 0
    """Of these rounds, the drafts up to and with the first that fell."""
    early: int = 1
    full: int = 1


@dataclass
class _Draft:
    """A round's drafted tokens (B, K), the states to verify (B, M, D), and for sampling their laws (B, K, V)."""

    tokens: list[Tensor]
    states: list[Tensor]
    laws: list[Tensor]


class Speculator:
    """One batch's generation. Use `speculate`."""

    def __init__(self, model: nn.Module, request: Request, settings: SelfSpeculation) -> None:
        layers = len(anatomy.blocks(model))
        self.settings, self.request = settings, request
        self.runner = DepthRunner(model, (settings.exit, layers), mask=request.mask, room=request.room)
        self.sampler = Sampler(request.sampling, range(request.rows), self.runner.device)
        self.tape = Tape(request)
        self.counts = _Counts()
        self.share = depth_fraction(model, settings.exit, request.room) if settings.bonus == "auto" else 0.0

    def run(self) -> tuple[Tensor, SpeculationStats]:
        runner, tape = self.runner, self.tape
        last = runner.prefill(self.request.ids)[-1][:, -1]
        tape.write(self.sampler.pick(runner.logits(1, last))[:, None])
        while not tape.done:
            self._round()
        counts, emitted = self.counts, tape.length - self.request.ids.shape[1]
        stats = SpeculationStats(
            exit=self.settings.exit,
            rounds=counts.rounds,
            drafted=counts.drafted,
            accepted=counts.accepted,
            rejected=counts.drafted - counts.accepted,
            early_passes=counts.early,
            full_passes=counts.full,
            emitted=emitted,
        )
        return tape.result(), stats

    def _round(self) -> None:
        draft = self._draft(min(self.settings.draft_len, self.tape.left))
        states = torch.cat(draft.states, dim=1) if len(draft.states) > 1 else draft.states[0]
        logits = self.runner.logits(1, self.runner.advance(1, states).readable)
        tokens = torch.cat(draft.tokens, dim=1)
        choose = self._judge_greedy if self.sampler.greedy else self._judge_drawn
        new, right = choose(logits, tokens, draft.laws)
        drafted = tokens.shape[1]
        active = self.request.rows if self.request.rows == 1 else int((~self.tape.finished).sum())
        self.counts.rounds += 1
        self.counts.full += 1
        self.counts.drafted += drafted * active
        self.counts.accepted += right * active
        self.counts.right += right
        self.counts.judged += min(right + 1, drafted)
        kept = self.tape.write(new)
        if not self.tape.done:
            self.runner.cut_to(self.tape.length - 1)
        assert self.tape.done or kept == new.shape[1]

    def _draft(self, most: int) -> _Draft:
        """At most `most` tokens from the first blocks."""
        draft, token, stopped = _Draft([], [], []), self.tape.last, False
        while len(draft.tokens) < most and not stopped:
            logits = self._early(token, draft)
            if self.sampler.greedy:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                law = self.sampler.probs(logits)
                token = draw(law, self.sampler.uniforms())[:, None]
                draft.laws.append(law)
            draft.tokens.append(token)
            stopped = self.settings.stop_confidence > 0 and self._unsure(logits)
        if not stopped and self.tape.left > most and self._bonus():
            draft.states.append(self.runner.advance(0, token).hidden)
            self.counts.early += 1
        return draft

    def _early(self, token: Tensor, draft: _Draft) -> Tensor:
        """Run (B, 1) tokens through the first blocks; their logits (B, V) there."""
        arrived = self.runner.advance(0, token)
        draft.states.append(arrived.hidden)
        self.counts.early += 1
        return self.runner.logits(0, arrived.readable[:, -1])

    def _unsure(self, logits: Tensor) -> bool:
        """True where a row that is still running is not confident: the batch advances by its shortest prefix."""
        unsure = confidence(logits) < self.settings.stop_confidence
        return bool((unsure & ~self.tape.finished).any())

    def _bonus(self) -> bool:
        if self.settings.bonus != "auto":
            return bool(self.settings.bonus)
        acceptance = (self.counts.right + 1) / (self.counts.judged + 2)
        return bonus_pays(acceptance, self.settings.draft_len, self.share)

    def _judge_greedy(self, logits: Tensor, tokens: Tensor, laws: list[Tensor]) -> tuple[Tensor, int]:
        """(new tokens (B, n), how many drafts stood): the full model's own choices up to the first that differs from a draft."""
        target = logits.argmax(dim=-1)
        right = self._shortest(target[:, : tokens.shape[1]] == tokens)
        return target[:, : right + 1], right

    def _judge_drawn(self, logits: Tensor, tokens: Tensor, laws: list[Tensor]) -> tuple[Tensor, int]:
        """As greedy, by accept or resample. Uniforms are drawn for every draft, so that a row's stream moves alike in each round."""
        drafted = tokens.shape[1]
        p, q = self.sampler.probs(logits), torch.stack(laws, dim=1)
        uniforms = torch.stack([self.sampler.uniforms() for _ in range(drafted)], dim=1)
        stands = accepted(p[:, :drafted], q, tokens, uniforms)
        right = self._shortest(stands)
        if right == logits.shape[1]:
            return tokens, right
        law = p[:, right]
        if right < drafted:
            law = residual(law, q[:, right])
        extra = draw(law, self.sampler.uniforms())
        if right < drafted:
            extra = torch.where(stands[:, right], tokens[:, right], extra)
        return torch.cat([tokens[:, :right], extra[:, None]], dim=1), right

    def _shortest(self, stands: Tensor) -> int:
        """The shortest accepted prefix among rows that are still running."""
        prefix = agreeing_prefix(stands)
        if self.request.rows > 1:
            prefix = torch.where(self.tape.finished, stands.shape[1], prefix)
        return int(prefix.min())


def bonus_pays(acceptance: float, draft_len: int, share: float) -> bool:
    """Whether tokens per cost are more with the bonus token than without.

    With every draft right by chance a, independently, a round gives (1 - a^K)/(1 - a) tokens at K c + 1 - c, or with the bonus
    (1 - a^(K+1))/(1 - a) at K c + 1.
    """
    tokens = sum(acceptance**k for k in range(draft_len))
    with_bonus = tokens + acceptance**draft_len
    return with_bonus / (draft_len * share + 1) > tokens / (draft_len * share + 1 - share)


def speculate(model: nn.Module, request: Request, settings: SelfSpeculation) -> tuple[Tensor, SpeculationStats]:
    """Ids (B, length), prompts included, and what it took. The model must be in evaluation mode."""
    return Speculator(model, request, settings).run()
