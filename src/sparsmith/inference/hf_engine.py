"""transformers' own self-speculation (`assistant_early_exit`), for comparison. It is made safe here: it changes the layer count of the
config while it drafts and leaves it changed after an error, so the count is put back and one model runs one such call at a time.

Its draft keeps keys and values of its own and prefills the prompt anew; it takes one row, and only families whose forward counts blocks by
the config.
"""

from __future__ import annotations

from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparsmith import anatomy
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.errors import UnsupportedAnatomy, UsageError
from sparsmith.inference.request import Request
from sparsmith.inference.speculative import SelfSpeculation

_RUNS_ALL_BLOCKS = ("gpt_neox", "gpt2")  # their forward does not look at the config's layer count
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_GUARD = Lock()


def speculate_hf(model: Any, request: Request, settings: SelfSpeculation) -> Tensor:
    """Ids (1, length), prompt included.

    Raises:
        UnsupportedAnatomy: a family that does not slice by its config. UsageError: several rows, or an exit with blocks of its own.
    """
    base: Any = anatomy.base_of(model)
    _check(base, model, request, settings)
    with _lock_of(base):
        count, early = base.config.num_hidden_layers, base.generation_config.assistant_early_exit
        try:
            return _run(base, request, settings)
        finally:
            base.config.num_hidden_layers = count
            base.generation_config.assistant_early_exit = early


def _run(base: Any, request: Request, settings: SelfSpeculation) -> Tensor:
    drawn = {name: getattr(request.sampling, name) for name in ("temperature", "top_k", "top_p")}
    sampled = request.sampling.do_sample
    if sampled and request.sampling.seed is not None:
        torch.manual_seed(request.sampling.seed)
    return base.generate(
        input_ids=request.ids,
        attention_mask=torch.ones_like(request.ids) if request.mask is None else request.mask.long(),
        max_new_tokens=request.max_new_tokens,
        assistant_early_exit=settings.exit,
        num_assistant_tokens=settings.draft_len,
        assistant_confidence_threshold=settings.stop_confidence,
        num_assistant_tokens_schedule="constant",
        eos_token_id=list(request.eos) or None,
        pad_token_id=request.pad,
        streamer=request.streamer,
        do_sample=sampled,
        **(drawn if sampled else {}),
    )


def _check(base: Any, model: Any, request: Request, settings: SelfSpeculation) -> None:
    kind = base.config.model_type
    if kind in _RUNS_ALL_BLOCKS:
        raise UnsupportedAnatomy(
            "engine `hf`",
            f"model_type `{kind}`, whose forward always runs all blocks",
            "a family that slices by its config",
            "Leave `engine` out: sparsmith's own runs every family.",
        )
    if request.rows > 1:
        raise UsageError("engine `hf`", f"{request.rows} prompts", "one prompt", "Leave `engine` out for batches.")
    if settings.exit in depths_of(model) and len(anatomy.blocks(at_depth(model, settings.exit))) != settings.exit:
        raise UsageError("engine `hf`", "an exit with a block of its own", "a bare exit", "Leave `engine` out.")


def _lock_of(model: Any) -> Any:
    with _GUARD:
        return _LOCKS.setdefault(model, Lock())
