"""Greedy continuations of many prompts at once.

Prompts of like length share a batch, padded on the left, with one key/value cache; a row leaves the batch as soon as it has written a
stop token, so that one long answer does not make the others wait. Our own loop rather than `model.generate`, because nothing of the
checkpoint's generation config (penalties, sampling, minimum lengths) may bend a measurement.

Shape letters: B rows still writing, S tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.evaluating.batching import BATCH_TOKENS, by_length, evaluation_mode, pad, pad_mask, takes_positions
from sparsmith.evaluating.pairs import continue_pairs


def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[int]]:
    """The continuation of every prompt, stop token left out; at most `max_new_tokens` tokens each."""
    written: list[list[int]] = [[] for _ in prompts]
    go_on = continue_pairs if anatomy.task_of(model) == anatomy.SEQ2SEQ else _continue
    with evaluation_mode(model) as device:
        for indices in by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens):
            rows = go_on([prompts[index] for index in indices], model, max_new_tokens, stop_ids, device)
            for index, row in zip(indices, rows):
                written[index] = row
    return written


def _continue(prompts: list, model: nn.Module, max_new_tokens: int, stop_ids: set[int], device: Any) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    ids_BS = pad(prompts, 0, left=True, device=device)
    mask_BS = pad_mask(prompts, left=True, device=device)
    cache, spare = None, last_logits(model)
    for step in range(max_new_tokens):
        output = model(**step_inputs(model, ids_BS, mask_BS), past_key_values=cache, use_cache=True, **spare)
        chosen_B = output.logits[:, -1].argmax(-1)
        stay = []
        for slot, (row, token) in enumerate(zip(live, chosen_B.tolist())):
            if token not in stop_ids:
                written[row].append(token)
                stay.append(slot)
        if not stay or step + 1 == max_new_tokens:
            break
        cache = output.past_key_values
        if len(stay) < len(live):
            keep = torch.tensor(stay, device=device)
            cache.batch_select_indices(keep)
            chosen_B, mask_BS, live = chosen_B[keep], mask_BS[keep], [live[slot] for slot in stay]
        ids_BS = chosen_B[:, None]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(live), 1)], dim=1)
    return written


def step_inputs(model: nn.Module, ids_BT: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
    """Arguments for a forward over the last T of S tokens; positions count real tokens alone, whatever the padding."""
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BS}
    if takes_positions(model):
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
        inputs["position_ids"] = positions_BS[:, -ids_BT.shape[1] :]
    return inputs


def last_logits(model: nn.Module) -> dict[str, int]:
    """Arguments that spare the head the positions before the last, where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's eos, and those of the generation config."""
    found = {tokenizer.eos_token_id}
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    found.update(eos if isinstance(eos, (list, tuple)) else [eos])
    return {int(token) for token in found if token is not None}
