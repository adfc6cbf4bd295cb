"""How a token is chosen from logits: the largest, or a draw after temperature, top-k and top-p.

The processors are transformers' own, applied alike to a draft and to its target. Every row draws from a stream of its own, one uniform per
choice, so that a row's tokens do not depend on its neighbours, on the depth at which they are read or on how requests are grouped.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparsmith.errors import UsageError
from sparsmith.ops.speculation import draw
from sparsmith.seeds import torch_generator

_BLOCK = 64  # uniforms drawn at once, per row
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # what transformers falls back on


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice; `do_sample=False` is greedy."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    """0 = all tokens."""
    top_p: float = 1.0
    seed: int | None = None
    """None = drawn from torch's global stream, which `torch.manual_seed` governs."""

    @classmethod
    def of(cls, model: Any, options: dict[str, Any]) -> Sampling:
        """Takes its settings out of `options`; what is not there is the model's `generation_config`'s, else transformers' default."""
        known = getattr(model, "generation_config", None)
        values: dict[str, Any] = {}
        for name, default in _DEFAULTS.items():
            given = options.pop(name, None)
            given = getattr(known, name, None) if given is None else given
            values[name] = default if given is None else given
        found = cls(do_sample=bool(options.pop("do_sample", False)), seed=options.pop("seed", None), **values)
        if found.do_sample and found.temperature <= 0:
            raise UsageError("temperature", f"{found.temperature}", "above 0", "Leave do_sample out for greedy text.")
        return found

    def processors(self) -> LogitsProcessorList:
        """In transformers' order."""
        chosen: list[LogitsProcessor] = []
        if self.temperature != 1.0:
            chosen.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            chosen.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p < 1.0:
            chosen.append(TopPLogitsWarper(float(self.top_p)))
        return LogitsProcessorList(chosen)


class Sampler:
    """Chooses tokens for the rows of one batch.

    Args:
        settings: greedy or not, and how.
        rows: the requests' numbers, which name their streams; 0..B-1 where a batch is not part of a larger one.
    """

    def __init__(self, settings: Sampling, rows: Sequence[int], device: torch.device) -> None:
        self.greedy = not settings.do_sample
        self.device = device
        if self.greedy:
            return
        seed = settings.seed if settings.seed is not None else int(torch.randint(2**62, ()))
        self._processors = settings.processors()
        self._streams = [torch_generator(seed, "generate", row) for row in rows]
        self._drawn = torch.empty(len(self._streams), 0)
        self._used = 0

    def probs(self, logits: Tensor) -> Tensor:
        """(..., V) the law that a token is drawn from."""
        flat = logits.reshape(-1, logits.shape[-1])
        dummy = torch.empty(flat.shape[0], 0, dtype=torch.long, device=logits.device)
        scores: Tensor = flat
        for process in self._processors:
            scores = process(cast(torch.LongTensor, dummy), cast(torch.FloatTensor, scores))
        return scores.softmax(dim=-1).view_as(logits)

    def uniforms(self) -> Tensor:
        """(B,) float64 in [0, 1), the next number of each row's stream."""
        if self._used == self._drawn.shape[1]:
            rows = [torch.rand(_BLOCK, generator=stream, dtype=torch.float64) for stream in self._streams]
            self._drawn, self._used = torch.stack(rows).to(self.device), 0
        self._used += 1
        return self._drawn[:, self._used - 1]

    def pick(self, logits: Tensor, uniform: Tensor | None = None) -> Tensor:
        """(B,) tokens for (B, V) logits."""
        if self.greedy:
            return logits.argmax(dim=-1)
        return draw(self.probs(logits), self.uniforms() if uniform is None else uniform)


class DrawnToken(LogitsProcessor):
    """For transformers' own greedy search: leaves the token that a `Sampler` draws as the only one."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        token = self.sampler.pick(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)  # type: ignore[return-value]


def confidence(logits: Tensor) -> Tensor:
    """(...,) largest softmax probability of (..., V), in (0, 1], before any processor."""
    return (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()
