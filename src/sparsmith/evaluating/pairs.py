"""What the measures do with an encoder-decoder: the prompt of a row is read once, and what follows is written to it.

Shape letters: B rows, O options of a batch, S tokens read, T written, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsmith import anatomy
from sparsmith.data.collate_pairs import PairCollator, shifted
from sparsmith.data.pairs import parted
from sparsmith.evaluating.batching import pad, pad_mask
from sparsmith.evaluating.rows import IGNORE
from sparsmith.methods.base import Batch


def pair_batch(rows: list[Any], domain: int, device: torch.device, model: nn.Module) -> Batch:
    """The batch of evaluation rows, padded on the right."""
    sides = [parted(row.input_ids, row.labels) for row in rows]
    mask = pad_mask([read for read, _ in sides], device=device)
    fills = PairCollator.of(anatomy.base_of(model).config)
    labels = pad([written for _, written in sides], IGNORE, device=device)
    return Batch(
        input_ids=pad([read for read, _ in sides], fills.pad_id, device=device),
        labels=labels,
        token_mask=mask.bool(),
        domain=torch.where(mask.bool(), domain, -1),
        attention_mask=mask,
        decoder_input_ids=shifted(labels, fills.start_id, fills.pad_id),
    )


def score_pairs(model: nn.Module, rows: Sequence[Sequence[Any]], device: torch.device) -> list[list[float]]:
    """Summed log-likelihood (nats) of every option of every row, by decoding all of them from what was read of the row once.

    Args:
        rows: options (`rank.Option`); those of a row share what is read, `ids[:start]`.
    """
    fills = PairCollator.of(anatomy.base_of(model).config)
    read_BSD, mask_BS = _read(model, [options[0].ids[: options[0].start] for options in rows], fills.pad_id, device)
    owner_O = torch.tensor([row for row, options in enumerate(rows) for _ in options], device=device)
    wanted_OT = pad([one.ids[one.start :] for options in rows for one in options], IGNORE, device=device)
    fed_OT = shifted(wanted_OT, fills.start_id, fills.pad_id)
    hidden_OTD = anatomy.decode(model, fed_OT, read_BSD[owner_O], mask_BS[owner_O])
    logits_OTV = anatomy.logits_of(model, hidden_OTD)
    loss_OT = F.cross_entropy(logits_OTV.transpose(1, 2).float(), wanted_OT, reduction="none", ignore_index=IGNORE)
    sums = iter((-loss_OT.double().sum(1)).tolist())
    return [[next(sums) for _ in options] for options in rows]


def continue_pairs(
    prompts: list[Sequence[int]], model: nn.Module, max_new_tokens: int, stop_ids: set[int], device: Any
) -> list[list[int]]:
    """The greedy answer to every prompt. Every step runs what is written so far anew: nothing of a cache is trusted here, and the answers
    that are measured are short."""
    fills = PairCollator.of(anatomy.base_of(model).config)
    read_BSD, mask_BS = _read(model, prompts, fills.pad_id, device)
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    fed_BT = torch.full((len(prompts), 1), fills.start_id, device=device)
    for _ in range(max_new_tokens):
        hidden_BTD = anatomy.decode(model, fed_BT, read_BSD[live], mask_BS[live])
        chosen_B = anatomy.logits_of(model, hidden_BTD[:, -1]).argmax(-1)
        stay = [slot for slot, token in enumerate(chosen_B.tolist()) if token not in stop_ids]
        for slot in stay:
            written[live[slot]].append(int(chosen_B[slot]))
        live = [live[slot] for slot in stay]
        if not live:
            break
        fed_BT = torch.cat([fed_BT, chosen_B[:, None]], dim=1)[stay]
    return written


def _read(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """((B, S, D) what the encoder makes of the prompts, (B, S) their mask)."""
    mask_BS = pad_mask(prompts, device=device)
    return anatomy.encode(model, pad(prompts, pad_id, device=device), mask_BS), mask_BS
