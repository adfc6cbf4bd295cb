"""Exact match: greedy answers, an extractor, and equality after normalisation (`answers.py` states it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsmith.bootstrap import RowScores
from sparsmith.errors import DataError
from sparsmith.evaluating.answers import extract
from sparsmith.evaluating.batching import BATCH_TOKENS
from sparsmith.evaluating.generation import greedy, stop_ids
from sparsmith.evaluating.rows import prompt_ids, require_rows, row_name, special_answer_end

if TYPE_CHECKING:
    from sparsmith.data import EvalSet


@dataclass(frozen=True)
class Answers:
    """What a model wrote to every row of a set."""

    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    """False where the answer was cut at `max_new_tokens`."""


def write_answers(
    model: nn.Module,
    tokenizer: Any,
    eval_set: EvalSet,
    *,
    rows: list[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Answers:
    """Greedy answers to the prompts of the set (or of the given rows of it)."""
    indices = list(range(len(eval_set.rows))) if rows is None else rows
    prompts = [prompt_ids(eval_set, index) for index in indices]
    stops = stop_ids(model, tokenizer) | special_answer_end(eval_set, tokenizer)
    limit = eval_set.source.max_new_tokens
    written = greedy(model, prompts, max_new_tokens=limit, stop_ids=stops, batch_tokens=batch_tokens)
    texts = tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in written)
    return Answers(texts, tuple(len(ids) < limit for ids in written))


def exact_match(
    model: nn.Module, tokenizer: Any, eval_set: EvalSet, *, batch_tokens: int = BATCH_TOKENS
) -> tuple[dict[str, RowScores], Answers]:
    """Rows' hits under `exact_match`, and the share of answers that ended by themselves under `finished`.

    Raises:
        DataError: a reference in which the extractor finds no answer; the row is named.
    """
    require_rows(eval_set)
    wanted = [_reference(eval_set, index) for index in range(len(eval_set.rows))]
    answers = write_answers(model, tokenizer, eval_set, batch_tokens=batch_tokens)
    source = eval_set.source
    hits = [extract(text, source.extractor, source.marker) == want for text, want in zip(answers.texts, wanted)]
    ones = (1.0,) * len(hits)
    scores = {
        "exact_match": RowScores(tuple(map(float, hits)), ones),
        "finished": RowScores(tuple(map(float, answers.finished)), ones),
    }
    return scores, answers


def _reference(eval_set: EvalSet, index: int) -> str:
    source = eval_set.source
    answer = extract(eval_set.rows[index].completion, source.extractor, source.marker)
    if answer is None:
        what = f"`{source.marker}`" if source.extractor == "after_marker" else source.extractor.replace("_", " ")
        raise DataError(
            row_name(eval_set, index),
            f"a reference without an answer for the extractor {source.extractor}",
            f"a completion with {what} in it",
            "Choose another extractor or marker for this set, or mend the row.",
        )
    return answer
