"""Held-out response loss: mean cross-entropy, in nats per labelled token, over all rows of a set.

Rows are sorted by length and padded on the right. Only the positions that predict a labelled token go through the output head; its
logits are made in slices of at most `HEAD_FLOATS` numbers, so that a large vocabulary costs no memory. Sums per row are kept, since
the intervals resample rows.

Shape letters: B rows, S tokens, P labelled positions of a batch (p: a slice of them), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsmith import anatomy
from sparsmith.bootstrap import RowScores
from sparsmith.errors import DataError, ProofError, UnsupportedAnatomy
from sparsmith.evaluating.batching import BATCH_TOKENS, by_length, evaluation_mode, pad, pad_mask
from sparsmith.evaluating.pairs import pair_batch
from sparsmith.evaluating.rows import IGNORE, require_rows, row_name
from sparsmith.methods.base import Batch

if TYPE_CHECKING:
    from sparsmith.data import EvalSet

HEAD_FLOATS = 1 << 26  # 256 MB of float32 logits

OnBatch = Callable[[Batch], None]


def heldout_loss(
    model: nn.Module,
    eval_set: EvalSet,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: OnBatch | None = None,
    domains: Sequence[str] = (),
    chosen: list[Tensor] | None = None,
) -> RowScores:
    """Summed loss and number of labelled tokens of every row.

    Args:
        model: a causal LM or an encoder-decoder; left in the mode it was in.
        eval_set: rows with `input_ids` and `labels`.
        batch_tokens: tokens of one forward, padding included.
        on_batch: called with each batch right before its forward, for methods that measure (expert load by domain).
        domains: the domains in the order of their indices in `Batch.domain`.
        chosen: where given, every row's most likely tokens at its labelled positions are put in, (labels of the row,) int64 each.

    Raises:
        ProofError: the loss of a row is not finite; the row is named.
    """
    require_rows(eval_set)
    rows = eval_set.rows
    domain = list(domains).index(eval_set.domain) if eval_set.domain in domains else -1
    total_N = torch.zeros(len(rows), dtype=torch.float64)
    tokens_N = torch.zeros(len(rows), dtype=torch.float64)
    chosen_N: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(rows)
    make = pair_batch if anatomy.task_of(model) == anatomy.SEQ2SEQ else _batch
    with evaluation_mode(model) as device:
        for indices in by_length([len(row.input_ids) for row in rows], batch_tokens):
            batch = make([rows[index] for index in indices], domain, device, model)
            if on_batch is not None:
                on_batch(batch)
            loss_B, tokens_B, chosen_P = _row_scores(model, batch, chosen is not None)
            total_N[indices], tokens_N[indices] = loss_B.double().cpu(), tokens_B.double().cpu()
            if chosen_P is not None:
                for index, part in zip(indices, chosen_P.cpu().split(tokens_B.long().tolist())):
                    chosen_N[index] = part
    for index in torch.nonzero(tokens_N == 0).flatten().tolist()[:1]:
        raise DataError(
            row_name(eval_set, index), "no labelled token", "an answer of at least one token", "Mend or drop the row."
        )
    for index in torch.nonzero(~torch.isfinite(total_N)).flatten().tolist()[:1]:
        raise ProofError(
            row_name(eval_set, index),
            f"a held-out loss of {total_N[index].item()}",
            "a finite loss",
            "The model's weights or activations are not finite on this row; look at the last training steps.",
        )
    if chosen is not None:
        chosen[:] = chosen_N
    return RowScores(tuple(total_N.tolist()), tuple(tokens_N.tolist()))


def row_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss (B,) in float32 and labelled tokens (B,) of each row."""
    return _row_scores(model, batch, False)[:2]


def _row_scores(model: nn.Module, batch: Batch, choose: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `row_losses`, and the most likely token (P,) of each labelled position, row by row, where `choose`."""
    targets = batch.labels[:, 1:] if batch.decoder_input_ids is None else batch.labels
    row_P, at_P = torch.nonzero(targets != IGNORE, as_tuple=True)
    targets_P = targets[row_P, at_P]
    parts = list(_losses(model, batch, row_P, at_P, targets_P, choose))
    loss_P = torch.cat([loss for loss, _ in parts])
    chosen_P = torch.cat([tokens for _, tokens in parts if tokens is not None]) if choose else None
    zeros = torch.zeros(len(targets), dtype=torch.float32, device=targets.device)
    return zeros.index_add(0, row_P, loss_P), zeros.index_add(0, row_P, torch.ones_like(loss_P)), chosen_P


def _losses(
    model: nn.Module, batch: Batch, row_P: Tensor, at_P: Tensor, targets_P: Tensor, choose: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Losses (P,) in slices, float32, each with the most likely tokens where `choose`."""
    logits_of = _label_logits(model, batch, row_P, at_P)
    vocab = anatomy.base_of(model).config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    for part in torch.arange(len(targets_P), device=row_P.device).split(max(1, HEAD_FLOATS // vocab)):
        logits_pV = logits_of(part)
        loss_p = F.cross_entropy(logits_pV.float(), targets_P[part], reduction="none")
        yield loss_p, logits_pV.argmax(-1) if choose else None


def _label_logits(model: nn.Module, batch: Batch, row_P: Tensor, at_P: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits (p, V) of a choice p of the labelled positions; of a family without an anatomy, from the whole forward."""
    if batch.decoder_input_ids is not None:
        read_BSD = anatomy.encode(model, batch.input_ids, batch.token_mask)
        written_PD = anatomy.decode(model, batch.decoder_input_ids, read_BSD, batch.token_mask)[row_P, at_P]
        return lambda part: anatomy.logits_of(model, written_PD[part])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    try:
        backbone = anatomy.backbone(model)
    except UnsupportedAnatomy:
        logits_PV = model(**inputs).logits[row_P, at_P]
        return lambda part: logits_PV[part]
    hidden_PD = backbone(**inputs).last_hidden_state[row_P, at_P]
    return lambda part: anatomy.logits_of(model, hidden_PD[part])


def _batch(rows: list[Any], domain: int, device: torch.device, _: nn.Module) -> Batch:
    ids = [list(row.input_ids) for row in rows]
    mask = pad_mask(ids, device=device)
    return Batch(
        input_ids=pad(ids, 0, device=device),
        labels=pad([list(row.labels) for row in rows], IGNORE, device=device),
        token_mask=mask.bool(),
        domain=torch.where(mask.bool(), domain, -1),
        attention_mask=mask,
    )
