"""Whole requests at a depth: each runs as the sub-model of that depth, by transformers' own generate.

Requests of one depth form one batch. Rows are padded on the left and draw from streams of their own, so what comes out does not depend on
the grouping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from sparsmith.crafting.slices import at_depth
from sparsmith.errors import UsageError
from sparsmith.inference.request import Request
from sparsmith.inference.sampling import DrawnToken, Sampler


@dataclass(frozen=True)
class DepthStats:
    """The depth that each request ran at, in blocks."""

    depths: tuple[int, ...]


def one_each(where: str, given: Any, rows: int) -> list[Any]:
    """A value per request: one for all, or a list of as many.

    Raises:
        UsageError: a list of another length.
    """
    if not isinstance(given, list | tuple):
        return [given] * rows
    if len(given) != rows:
        raise UsageError(where, f"{len(given)} values", f"{rows}, one per prompt", "Give one value, or one each.")
    return list(given)


def run_depths(model: Any, request: Request, depths: list[int], options: dict[str, Any]) -> tuple[Tensor, DepthStats]:
    """Ids (B, length), prompts included, each row at its depth; `options` go to transformers' generate."""
    views = {depth: at_depth(model, depth) for depth in dict.fromkeys(depths)}
    answers: list[tuple[list[int], Tensor]] = []
    for depth, view in views.items():
        rows = [row for row, own in enumerate(depths) if own == depth]
        part = request if len(views) == 1 else request.part(rows)
        ids = _run(view, part, rows, dict(options))
        answers.append((rows, ids[:, part.ids.shape[1] :]))
    longest = max(ids.shape[1] for _, ids in answers)
    together = request.ids.new_full((request.rows, request.ids.shape[1] + longest), request.pad)
    together[:, : request.ids.shape[1]] = request.ids
    for rows, ids in answers:
        together[rows, request.ids.shape[1] : request.ids.shape[1] + ids.shape[1]] = ids
    return together, DepthStats(tuple(depths))


def _run(view: Any, request: Request, rows: list[int], options: dict[str, Any]) -> Tensor:
    if request.sampling.do_sample:
        drawn = DrawnToken(Sampler(request.sampling, rows, request.ids.device))
        options["logits_processor"] = LogitsProcessorList([*options.get("logits_processor", ()), drawn])
    return view.generate(
        input_ids=request.ids,
        attention_mask=torch.ones_like(request.ids) if request.mask is None else request.mask.long(),
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(request.eos) or None,
        pad_token_id=request.pad,
        streamer=request.streamer,
        do_sample=False,
        **options,
    )
