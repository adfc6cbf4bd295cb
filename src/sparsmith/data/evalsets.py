"""Rows that are held out: as text for generation, as tokens for the loss, with their options for rank classification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsmith.data.prepare import encode_rows, read_counts
from sparsmith.data.rows import Reject, RowFault
from sparsmith.data.sources import Example, read_rows
from sparsmith.data.tokens import TokenRow, cut_ids
from sparsmith.errors import DataError
from sparsmith.recipe.schema import DataSettings, EvalSource

LIMIT_SEED = 0
"""`limit` of an eval source takes the same rows whatever the run's seed, so that runs can be compared row by row."""


@dataclass(frozen=True)
class OptionRow:
    """One option after the prompt. `labels` are -100 outside the option."""

    text: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EvalRow:
    """A held-out row."""

    place: str
    """`file:line`"""
    prompt: str
    """What stands before the last answer, rendered, without bos."""
    prompt_ids: list[int]
    """The same as ids with the bos: what `generate` starts from."""
    completion: str
    """The last answer, the reference."""
    input_ids: list[int]
    labels: list[int]
    """-100 = not trained; not shifted."""
    options: tuple[str, ...] | None = None
    option_rows: tuple[OptionRow, ...] = ()
    """Options as tokens, without the eos: a sum of log-likelihoods over `labels` is the option's score."""
    answer_index: int | None = None
    """Which option is the reference."""
    label: int | None = None
    """The class, of a classifier's row, which has no other labels."""


@dataclass
class EvalSet:
    """The rows of an eval source."""

    name: str
    domain: str
    domain_index: int
    source: EvalSource
    rows: list[EvalRow]
    counts: dict[str, Any]
    rejects: list[Reject]
    fingerprints: dict[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def batch_rows(self) -> list[dict[str, Any]]:
        """The rows as the collator takes them; `sample_ids` are their numbers."""
        return [
            {
                "input_ids": row.input_ids,
                "labels": row.labels if row.label is None else row.label,
                "domain": [self.domain_index] * len(row.input_ids),
                "sample_ids": index,
            }
            for index, row in enumerate(self.rows)
        ]


def load_eval(source: EvalSource, domain_index: int, settings: DataSettings, encoder: Any, base_dir: Path) -> EvalSet:
    """Read and encode an eval source. Rows that cannot be held in `max_length` are left out and counted."""
    rows = read_rows(source, settings.on_bad_row, base_dir, LIMIT_SEED, classes=encoder.classes)
    stop = (source.on_bad_row or settings.on_bad_row) == "stop"
    encoded = encode_rows(rows.rows, rows.rejects, encoder, settings, stop)
    counts = read_counts(rows) | {"domain": source.domain, "over_long": 0, "truncated": 0, "all_masked": 0}
    fitting: list[tuple[Example, TokenRow]] = []
    for example, tokens in encoded:
        row, reason = _fit(example, tokens, settings, encoder.ending)
        if reason:
            counts[reason] += 1
        if row is not None:
            fitting.append((example, row))
    kept = _eval_rows(fitting, encoder) if encoder.classes is None else _class_rows(fitting, encoder)
    if not kept:
        raise DataError(
            source.path, f"no row left: {counts}", "a row that can be evaluated", "Check data.max_length and `columns`."
        )
    counts |= {
        "kept": len(kept),
        "tokens": sum(len(row.input_ids) for row in kept),
        "trained_tokens": sum(label >= 0 for row in kept for label in row.labels),
    }
    return EvalSet(source.name, source.domain, domain_index, source, kept, counts, rows.rejects, rows.fingerprints)


def _fit(
    example: Example, row: TokenRow, settings: DataSettings, ending: tuple[int, ...]
) -> tuple[TokenRow | None, str]:
    """(the row as it is used, the count that it falls under)."""
    reason = ""
    if len(row.ids) > settings.max_length:
        if settings.over_long == "stop":
            where = f"{example.file}:{example.line}"
            raise DataError(
                where,
                f"a row of {len(row.ids)} tokens",
                f"at most {settings.max_length}",
                "Raise data.max_length, or set data.over_long.",
            )
        if settings.over_long == "drop":
            return None, "over_long"
        row = TokenRow(cut_ids(row.ids, settings.max_length, ending), row.trained[: settings.max_length])
        reason = "truncated"
    return (row, reason) if any(row.trained) or example.label is not None else (None, "all_masked")


def _class_rows(fitting: list[tuple[Example, TokenRow]], encoder: Any) -> list[EvalRow]:
    """The rows of a classifier: nothing is written after their text."""
    return [
        EvalRow(
            place=f"{example.file}:{example.line}",
            prompt=encoder.prompt_text(example.messages),
            prompt_ids=[],
            completion=example.messages[-1]["content"],
            input_ids=row.ids,
            labels=[],
            label=example.label,
        )
        for example, row in fitting
    ]


def _eval_rows(fitting: list[tuple[Example, TokenRow]], encoder: Any) -> list[EvalRow]:
    """The rows with their prompts and options, encoded together."""
    try:
        heads = encoder.prompts_ids([example.messages for example, _ in fitting])
    except RowFault as fault:
        raise fault.at(fitting[0][0].file, fitting[0][0].line) from None
    answers = [(example, option) for example, _ in fitting for option in example.options or ()]
    encoded = iter(encoder.encode([[*e.messages[:-1], {"role": "assistant", "content": text}] for e, text in answers]))
    rows = []
    for (example, row), head in zip(fitting, heads):
        completion = example.messages[-1]["content"]
        options = tuple(_option_row(option, next(encoded), len(head), example) for option in example.options or ())
        is_text = example.messages[0]["role"] == "text"
        rows.append(
            EvalRow(
                place=f"{example.file}:{example.line}",
                prompt="" if is_text else encoder.prompt_text(example.messages),
                prompt_ids=[] if is_text else head,
                completion=completion,
                input_ids=row.ids,
                labels=labels_of(row),
                options=example.options,
                option_rows=options,
                answer_index=(example.options or ()).index(completion)
                if completion in (example.options or ())
                else None,
            )
        )
    return rows


def labels_of(row: TokenRow) -> list[int]:
    """-100 where a token is not trained."""
    return [token if trained else -100 for token, trained in zip(row.ids, row.trained)]


def _option_row(option: str, row: TokenRow | RowFault, head: int, example: Example) -> OptionRow:
    """The conversation with `option` as its last answer, up to the end of the option's text; `head` tokens are the prompt."""
    if isinstance(row, RowFault):
        raise row.at(example.file, example.line)
    stop = max(place for place, trained in enumerate(row.trained) if trained)
    ids = row.ids[:stop] if stop > head else row.ids
    return OptionRow(option, ids, [-100 if place < head else token for place, token in enumerate(ids)])
