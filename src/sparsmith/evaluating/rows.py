"""What the measures need of an evaluation row: its name for errors, its prompt in tokens, what its answers end in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sparsmith.errors import DataError

if TYPE_CHECKING:
    from sparsmith.data import EvalSet

    EvalSets = Mapping[str, EvalSet] | Iterable[EvalSet]

IGNORE = -100


def row_name(eval_set: EvalSet, index: int) -> str:
    """`gsm8k row 17 (test.jsonl:18)`."""
    return f"{eval_set.name} row {index} ({eval_set.rows[index].place})"


def prompt_ids(eval_set: EvalSet, index: int) -> list[int]:
    """Tokens before the row's answer: template, prompt and opening tokens, exactly as in training.

    Raises:
        DataError: the row is plain text, without a prompt.
    """
    ids = eval_set.rows[index].prompt_ids
    if not ids:
        raise DataError(
            row_name(eval_set, index),
            "a text without a prompt",
            "a prompt and an answer",
            "Give the set a prompt and a completion, or leave its metrics at loss.",
        )
    return list(ids)


def special_answer_end(eval_set: EvalSet, tokenizer: Any) -> set[int]:
    """The special token that closes the answers of this set (a chat template's end of turn), if they end in one."""
    labels = [token for token in eval_set.rows[0].labels if token != IGNORE]
    return {labels[-1]} & set(tokenizer.all_special_ids) if labels else set()


def require_rows(eval_set: EvalSet) -> None:
    if not len(eval_set.rows):
        raise DataError(eval_set.name, "no rows", "at least one row", "Look at the set's path, `where` and `limit`.")


def rows_fingerprint(eval_set: EvalSet) -> str:
    """sha256 over tokens and labels of all rows: two results may be paired only where it is equal."""
    digest = hashlib.sha256()
    for row in eval_set.rows:
        known = list(row.labels) if row.label is None else row.label
        digest.update(repr((list(row.input_ids), known)).encode())
    return digest.hexdigest()


def sets_of(eval_sets: EvalSets) -> list[EvalSet]:
    """The sets of a mapping by name, or of any iterable of sets."""
    return list(eval_sets.values()) if isinstance(eval_sets, Mapping) else list(eval_sets)
