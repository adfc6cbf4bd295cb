"""Text from a model, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sparsmith.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(model: PreTrainedModel, input_ids: Tensor, *, max_new_tokens: int = 64, **options: Any) -> Tensor:
    """Token ids (B, S + new), prompt included. Greedy unless `do_sample=True`.

    Args:
        model: a base, a crafted or a loaded model; put into evaluation mode for the call.
        input_ids: (B, S) int64; pad on the left and give `attention_mask` where rows differ in length.
        options: what transformers' `generate` takes.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            options.setdefault("attention_mask", torch.ones_like(input_ids))
            options.setdefault("do_sample", False)
            return cast(Any, model).generate(input_ids=input_ids, max_new_tokens=max_new_tokens, **options)
    finally:
        model.train(was_training)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    **options: Any,
) -> Iterator[str]:
    """Pieces of the answer as they come.

    Raises:
        UsageError: the prompt leaves no room in the model's context.
    """
    from transformers import TextIteratorStreamer

    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and len(prompt_ids) + max_new_tokens > room:
        raise UsageError(
            "prompt",
            f"{len(prompt_ids)} tokens and {max_new_tokens} new ones",
            f"at most {room} together",
            "Shorten the prompt or lower --max-new-tokens.",
        )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([prompt_ids], device=model.device)
    fault: list[BaseException] = []

    def work() -> None:
        try:
            generate(
                model,
                ids,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        except BaseException as error:  # handed to the caller's thread below
            fault.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if fault:
        raise fault[0]
