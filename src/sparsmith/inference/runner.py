"""Runs a model's blocks in segments, each over its own growing keys and values: the engine below every mode.

    runner = DepthRunner(model, (2, 6))         segments: blocks 1..2 and 3..6
    state = runner.advance(0, ids)              tokens through the first segment
    runner.logits(0, state.readable[:, -1])     what the model says at depth 2
    runner.advance(1, state.hidden)             the same tokens through the rest

The family's own decoder runs each segment (`anatomy.views`), so its masks, rotary positions and sliding windows hold, and nothing of the
model is set, patched or hooked: two threads may run one model. A segment may lag behind the ones below it by any number of tokens;
positions and masks follow from what it holds itself.

Shapes: B rows, S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy import views
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.inference.cache import GrowingLayer, SegmentCache


class Arrived(NamedTuple):
    """What comes out of a segment."""

    hidden: Tensor
    """(B, S, D) as the next segment takes it."""
    readable: Tensor
    """(B, S, D) as the norm and head take it: behind the exit's own blocks where the method has some."""


class _Arriving(nn.Module):
    """In the place of a later segment's embeddings: gives the states that arrive. So every segment is called with token ids, which some
    routers read, whatever its blocks are fed."""

    states: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return self.states


@dataclass(frozen=True)
class Segment:
    """Blocks start+1..stop, and the blocks that follow them when the model is read out at `stop`."""

    stop: int
    run: Any
    """The decoder over these blocks."""
    cache: SegmentCache
    norm: nn.Module
    reader: Any
    """The sub-model whose head reads here."""
    tail: Any = None
    tail_cache: SegmentCache | None = None

    @property
    def caches(self) -> tuple[SegmentCache, ...]:
        return (self.cache,) if self.tail_cache is None else (self.cache, self.tail_cache)


class DepthRunner:
    """One batch's way through a model, with a stop at each of `depths`.

    Args:
        model: a causal LM of a known family, base or crafted, in evaluation mode.
        depths: ascending; the last is where full passes end.
        mask: (B, prompt) 1 = token, 0 = padding on the left; None where no row is padded.
        room: tokens per row that will be run at most, prompt included.
    """

    def __init__(self, model: nn.Module, depths: Sequence[int], *, mask: Tensor | None, room: int) -> None:
        self.device = next(model.parameters()).device
        self.depths = tuple(depths)
        self.segments = [
            _segment(model, start, stop) for start, stop in zip((0, *self.depths[:-1]), self.depths, strict=True)
        ]
        self._mask, self._places = _mask_and_places(mask, room, self.device)
        self._embeddings = _embeddings(model)
        self._ids: Tensor | None = None
        self._room = room

    def advance(self, index: int, given: Tensor) -> Arrived:
        """Run the next tokens through segment `index`: ids (B, S) for the first, hidden states (B, S, D) for the others."""
        segment = self.segments[index]
        if index == 0:
            self._note(given, segment.cache.length)
        hidden = self._run(segment.run, segment.cache, None if index == 0 else given, given.shape[1])
        if segment.tail is None:
            return Arrived(hidden, hidden)
        tail_cache = cast(SegmentCache, segment.tail_cache)
        return Arrived(hidden, self._run(segment.tail, tail_cache, hidden, given.shape[1]))

    def prefill(self, ids: Tensor) -> list[Tensor]:
        """Run (B, S) tokens through every segment; the readable states at each depth."""
        found, given = [], ids
        for index in range(len(self.segments)):
            given, readable = self.advance(index, given)
            found.append(readable)
        return found

    def logits(self, index: int, readable: Tensor) -> Tensor:
        """(..., V) of readable states (..., D) at the end of segment `index`; float32, float64 for a float64 model."""
        segment = self.segments[index]
        logits = anatomy.logits_of(segment.reader, segment.norm(readable))
        return logits if logits.dtype == torch.float64 else logits.float()

    def length(self, index: int) -> int:
        """Tokens whose keys and values segment `index` holds."""
        return self.segments[index].cache.length

    def cut_to(self, length: int) -> None:
        """Forget every token from the one at `length` on, in all segments."""
        for segment in self.segments:
            for cache in segment.caches:
                cache.cut_to(length)

    def keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """(B, H, S, P) each, block by block, the exits' own blocks left out."""
        return [(layer.keys, layer.values) for segment in self.segments for layer in segment.cache.own]

    def _note(self, ids: Tensor, start: int) -> None:
        if self._ids is None:
            self._ids = ids.new_zeros(ids.shape[0], self._room)
        self._ids[:, start : start + ids.shape[1]] = ids

    def _run(self, decoder: Any, cache: SegmentCache, states: Tensor | None, tokens: int) -> Tensor:
        """The next tokens through a decoder, from `states` where they come from an earlier one."""
        start = cache.length
        stop = start + tokens
        if states is not None:
            decoder._modules[self._embeddings].states = states
        return decoder(
            input_ids=cast(Tensor, self._ids)[:, start:stop],
            attention_mask=None if self._mask is None else self._mask[:, :stop],
            position_ids=self._places[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def _segment(model: nn.Module, start: int, stop: int) -> Segment:
    blocks = list(anatomy.blocks(model))
    here = range(start, stop)
    run = _decoder(model, blocks[start:stop], here, first=start == 0)
    cache = SegmentCache([GrowingLayer() for _ in here], start)
    # an exit that was tuned is read out as its own sub-model would be; any other depth by the model's norm and head
    reader = at_depth(model, stop) if stop in depths_of(model) else model
    norm = anatomy.walk(anatomy.base_of(reader), anatomy.anatomy_of(reader).norm)
    tail = list(anatomy.blocks(reader))[stop:] if reader is not model else []
    if not tail:
        return Segment(stop, run, cache, norm, reader)
    stand_for = [min(stop + place, len(blocks) - 1) for place in range(len(tail))]
    tail_cache = SegmentCache([GrowingLayer() for _ in tail], stop)
    return Segment(stop, run, cache, norm, reader, _decoder(model, tail, stand_for), tail_cache)


def _embeddings(model: nn.Module) -> str:
    """Name of the embeddings in the decoder."""
    return anatomy.anatomy_of(model).embeddings.rpartition(".")[2]


def _decoder(model: nn.Module, blocks: Sequence[nn.Module], like: Sequence[int], first: bool = False) -> Any:
    view = views.backbone_of(model, blocks, like, embeds=first)
    if not first:
        view._modules[_embeddings(model)] = _Arriving()
    return view


def _mask_and_places(mask: Tensor | None, room: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """(B, room) mask of every token to come, or None, and (B or 1, room) positions, padding not counted."""
    places = torch.arange(room, device=device)[None]
    if mask is None or bool(mask.all()):
        return None, places
    whole = torch.ones(mask.shape[0], room, dtype=torch.bool, device=device)
    whole[:, : mask.shape[1]] = mask.to(device).bool()
    padding = (~whole).sum(dim=1, keepdim=True)
    return whole, (places - padding).clamp(min=0)
