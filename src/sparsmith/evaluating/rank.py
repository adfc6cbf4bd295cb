"""Rank classification: each option is scored by the summed log-likelihood of its tokens after the prompt; the best one is the answer.

Reported, all on the same scores: `rank` (the raw sum), `rank_by_token` (divided by the option's tokens), `rank_by_byte` (divided by its
UTF-8 bytes: bytes rather than characters, so that the figure does not hang on how a script composes its letters), and `rank_margin`
(raw score of the right option minus that of the best other, in nats; positive = right). Options that tie for the best share the hit:
1/k each, the expected accuracy of a fair draw. The end-of-sequence token is not scored.

An option is tokenised as the answer of its conversation would be in training, so that both meet the prompt at the same boundary. The
tokens that all options of a row share go through the
model once, and their key/value cache is read by every option. Of an encoder-decoder the prompt is read once, and every option is written
to it.

Paper: Sanh et al. 2021 (arXiv 2110.08207), section 5 names the procedure.
Shape letters: B rows of a batch, O options of a batch, T option tokens, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from sparsmith import anatomy
from sparsmith.bootstrap import RowScores
from sparsmith.errors import DataError, ProofError
from sparsmith.evaluating.batching import BATCH_TOKENS, by_length, evaluation_mode, pad, pad_mask
from sparsmith.evaluating.generation import last_logits, step_inputs
from sparsmith.evaluating.pairs import score_pairs
from sparsmith.evaluating.rows import IGNORE, require_rows, row_name

if TYPE_CHECKING:
    from sparsmith.data import EvalSet
    from sparsmith.data.evalsets import OptionRow

TIE = 1e-6  # nats; equal scores differ by rounding


@dataclass(frozen=True)
class Option:
    """One option as tokens: `ids[start:]` is scored."""

    ids: tuple[int, ...]
    start: int


def rank_classification(
    model: nn.Module, eval_set: EvalSet, *, batch_tokens: int = BATCH_TOKENS
) -> dict[str, RowScores]:
    """Metric name -> rows, as the module's head says.

    Raises:
        DataError: a row without options, or whose answer is none of them.
        ProofError: a score that is not finite; the row is named.
    """
    require_rows(eval_set)
    right = [_right_option(eval_set, index) for index in range(len(eval_set.rows))]
    options = [[_tokens(option) for option in row.option_rows] for row in eval_set.rows]
    scores = score_options(model, options, batch_tokens=batch_tokens)
    found: dict[str, list[float]] = {"rank": [], "rank_by_token": [], "rank_by_byte": [], "rank_margin": []}
    for index, row in enumerate(eval_set.rows):
        raw, best = scores[index], right[index]
        _require_finite(eval_set, index, raw)
        tokens = [len(option.ids) - option.start for option in options[index]]
        found["rank"].append(_hit(raw, best))
        found["rank_by_token"].append(_hit([s / n for s, n in zip(raw, tokens)], best))
        found["rank_by_byte"].append(_hit([s / len(o.text.encode()) for s, o in zip(raw, row.option_rows)], best))
        found["rank_margin"].append(raw[best] - max(s for o, s in enumerate(raw) if o != best))
    ones = (1.0,) * len(eval_set.rows)
    return {metric: RowScores(tuple(values), ones) for metric, values in found.items()}


def score_options(
    model: nn.Module, rows: Sequence[Sequence[Option]], *, batch_tokens: int = BATCH_TOKENS
) -> list[list[float]]:
    """Summed log-likelihood (nats) of every option of every row."""
    scores: list[list[float]] = [[] for _ in rows]
    widths = [sum(len(option.ids) for option in options) for options in rows]
    score = score_pairs if anatomy.task_of(model) == anatomy.SEQ2SEQ else _score_batch
    with evaluation_mode(model) as device:
        for indices in by_length(widths, batch_tokens):
            for index, values in zip(indices, score(model, [rows[i] for i in indices], device)):
                scores[index] = values
    return scores


def _score_batch(model: nn.Module, rows: list[Sequence[Option]], device: torch.device) -> list[list[float]]:
    shared = [_shared_tokens(options) for options in rows]
    owner = [row for row, options in enumerate(rows) for _ in options]
    flat = [option for options in rows for option in options]
    tails = [option.ids[shared[row] :] for row, option in zip(owner, flat)]
    cache, prefixes = None, [options[0].ids[:n] for options, n in zip(rows, shared)]
    mask_OS = torch.zeros(len(flat), 0, dtype=torch.int64, device=device)
    if all(prefixes):
        mask_BS = pad_mask(prefixes, left=True, device=device)
        inputs = step_inputs(model, pad(prefixes, 0, left=True, device=device), mask_BS)
        cache = model(**inputs, use_cache=True, **last_logits(model)).past_key_values
        owner_O = torch.tensor(owner, device=device)
        cache.batch_select_indices(owner_O)
        mask_OS = mask_BS[owner_O]
    else:
        tails = [option.ids for option in flat]
    ids_OT = pad([tail[:-1] for tail in tails], 0, device=device)
    mask_OS = torch.cat([mask_OS, pad_mask([tail[:-1] for tail in tails], device=device)], dim=1)
    logits_OTV = model(**step_inputs(model, ids_OT, mask_OS), past_key_values=cache, use_cache=cache is not None).logits
    scored = [len(option.ids) - option.start for option in flat]
    wanted_OT = pad(
        [[IGNORE] * (len(tail) - 1 - n) + list(tail[len(tail) - n :]) for tail, n in zip(tails, scored)],
        -100,
        device=device,
    )
    loss_OT = F.cross_entropy(logits_OTV.transpose(1, 2).float(), wanted_OT, reduction="none")
    sums = iter((-loss_OT.double().sum(1)).tolist())
    return [[next(sums) for _ in options] for options in rows]


def _shared_tokens(options: Sequence[Option]) -> int:
    """Length of the beginning that all options share, less one: the token before the first scored one must be run anew."""
    shortest = min(option.start for option in options)
    same = 0
    while same < shortest and len({option.ids[same] for option in options}) == 1:
        same += 1
    return max(0, min(same, shortest - 1))


def _hit(scores: Sequence[float], right: int) -> float:
    best = max(scores)
    ties = [index for index, score in enumerate(scores) if best - score <= TIE]
    return 1.0 / len(ties) if right in ties else 0.0


def _tokens(option: OptionRow) -> Option:
    return Option(tuple(option.input_ids), next(at for at, label in enumerate(option.labels) if label != IGNORE))


def _right_option(eval_set: EvalSet, index: int) -> int:
    row = eval_set.rows[index]
    if len(row.option_rows) < 2 or row.answer_index is None:
        raise DataError(
            row_name(eval_set, index),
            f"{len(row.option_rows)} options, the answer {'among' if row.answer_index is not None else 'not among'} them",
            "at least two options, one of them the answer",
            "Give the set `options`, and let `columns: {completion: ...}` name the text of the right one.",
        )
    return row.answer_index


def _require_finite(eval_set: EvalSet, index: int, scores: Sequence[float]) -> None:
    if not all(abs(score) < float("inf") for score in scores):
        raise ProofError(
            row_name(eval_set, index),
            f"option scores {list(scores)}",
            "finite log-likelihoods",
            "The model's weights or activations are not finite on this row; look at the last training steps.",
        )
