"""One batch of prompts on its way to answers: what is asked, and the tape on which tokens are written as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsmith.errors import UsageError
from sparsmith.inference.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """Prompts and where to stop. `mask` is None where no row is padded."""

    ids: Tensor
    """(B, S) int64, padded on the left."""
    mask: Tensor | None
    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    sampling: Sampling
    streamer: Any = None

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def room(self) -> int:
        """Tokens per row at most."""
        return self.ids.shape[1] + self.max_new_tokens

    def part(self, rows: list[int]) -> Request:
        """Some of the rows, with the columns that are padding for all of them cut off."""
        ids = self.ids[rows]
        if self.mask is None:
            return Request(ids, None, self.max_new_tokens, self.eos, self.pad, self.sampling, self.streamer)
        mask = self.mask[rows]
        cut = int((~mask).sum(dim=1).min())
        mask = mask[:, cut:]
        left = None if bool(mask.all()) else mask
        return Request(ids[:, cut:], left, self.max_new_tokens, self.eos, self.pad, self.sampling, self.streamer)


def make_request(
    model: Any, inputs: Any, *, max_new_tokens: int, sampling: Sampling, streamer: Any, options: dict[str, Any]
) -> Request:
    """Checks the inputs; takes `attention_mask`, `eos_token_id` and `pad_token_id` out of `options`.

    Raises:
        UsageError: no prompt, padding on the right or inside, a streamer for several rows, nothing to generate.
    """
    mask = options.pop("attention_mask", None)
    if not isinstance(inputs, Tensor):
        mask = inputs.get("attention_mask") if mask is None else mask
        inputs = inputs["input_ids"]
    ids = inputs.to(model.device)
    if ids.dim() != 2 or not ids.numel():
        raise UsageError(
            "inputs", f"a tensor {tuple(ids.shape)}", "token ids (rows, tokens)", "Give one row per prompt."
        )
    if max_new_tokens < 1:
        raise UsageError("max_new_tokens", str(max_new_tokens), "at least 1", "Ask for one token or more.")
    if streamer is not None and ids.shape[0] > 1:
        raise UsageError("streamer", f"{ids.shape[0]} prompts", "one prompt", "Stream one prompt at a time.")
    known = getattr(model, "generation_config", None)
    eos = options.pop("eos_token_id", getattr(known, "eos_token_id", None))
    eos = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    pad = options.pop("pad_token_id", None)
    pad = getattr(known, "pad_token_id", None) if pad is None else pad
    pad = (eos[0] if eos else 0) if pad is None else int(pad)
    return Request(ids, _checked_mask(mask, ids), max_new_tokens, eos, pad, sampling, streamer)


# of a generation config: what changes the choice of a token in a way that these engines do not know, and its neutral values
_UNKNOWN = {
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "forced_eos_token_id": (),
    "typical_p": (1.0,),
    "min_p": (0.0,),
}


def refuse_leftovers(model: Any, mode: str, options: dict[str, Any]) -> None:
    """A setting that this mode would not heed is an error, be it an option or the model's own `generation_config`."""
    if options:
        name = next(iter(options))
        raise UsageError(
            name,
            f"{options[name]!r} beside `{mode}`",
            "attention_mask, eos_token_id, pad_token_id, do_sample, temperature, top_k, top_p, seed",
            f"Drop `{name}`, or generate by `depth`, which takes all of transformers' options.",
        )
    known = getattr(model, "generation_config", None)
    for name, neutral in _UNKNOWN.items():
        value = getattr(known, name, None)
        if value is not None and value not in neutral:
            raise UsageError(
                f"generation_config.{name}",
                f"{value!r} beside `{mode}`",
                "its neutral value",
                f"Set `model.generation_config.{name} = None`, or generate by `depth`, which heeds it.",
            )


def _checked_mask(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = mask.to(ids.device).bool()
    if mask.shape != ids.shape:
        raise UsageError("attention_mask", str(tuple(mask.shape)), str(tuple(ids.shape)), "Give the mask of these ids.")
    if bool(mask.all()):
        return None
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise UsageError(
            "attention_mask",
            "padding on the right of, or inside, a prompt",
            "padding on the left alone",
            "Set `tokenizer.padding_side = 'left'`.",
        )
    return mask


class Tape:
    """Prompt and answers of a batch, (B, room) on the device; rows end at their end token, and are padded from there on."""

    def __init__(self, request: Request) -> None:
        self.request = request
        ids = request.ids
        self.tokens = ids.new_full((request.rows, request.room), request.pad)
        self.tokens[:, : ids.shape[1]] = ids
        self.length = ids.shape[1]
        """Columns that hold a token of the batch."""
        self.finished = torch.zeros(request.rows, dtype=torch.bool, device=ids.device)
        self.done = False
        self._eos = torch.tensor(request.eos, device=ids.device) if request.eos else None
        if request.streamer is not None:
            request.streamer.put(ids.cpu())

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.tokens.shape[1] - self.length

    @property
    def last(self) -> Tensor:
        """(B, 1) the tokens that no block has seen yet."""
        return self.tokens[:, self.length - 1 : self.length]

    def write(self, new: Tensor) -> int:
        """Append (B, n) tokens, n <= `left`, cutting behind end tokens; how many columns were kept."""
        kept = new.shape[1]
        if self._eos is not None:
            kept, new = self._cut(new, self._eos)
        self.tokens[:, self.length : self.length + kept] = new[:, :kept]
        self.length += kept
        self.done = self.done or self.left == 0
        if self.request.streamer is not None:
            self.request.streamer.put(new[:, :kept].reshape(-1).cpu())
        return kept

    def _cut(self, new: Tensor, eos: Tensor) -> tuple[int, Tensor]:
        ends = torch.isin(new, eos)
        before = torch.cat([self.finished[:, None], ends[:, :-1]], dim=1).cumsum(dim=1) > 0
        if self.request.rows > 1:
            new = torch.where(before, self.request.pad, new)
        self.finished = self.finished | ends.any(dim=1)
        if not bool(self.finished.all()):
            return new.shape[1], new
        self.done = True
        return int((~before).any(dim=0).sum()), new

    def result(self) -> Tensor:
        """(B, length), as transformers' generate returns it."""
        if self.request.streamer is not None:
            self.request.streamer.end()
        return self.tokens[:, : self.length].clone()
