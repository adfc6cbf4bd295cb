"""The options of a rank-classification row, and the reference as one of them.

`options` of an eval source is one of: fixed options; a column that holds a list; a column whose text carries them, as FLAN
(`Options:\\n- yes\\n- no`, `(A) ...`) or LLM-Adapters (`Answer format: true/false`) write it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sparsmith.data.columns import Columns, look_up
from sparsmith.data.messages import NAMES
from sparsmith.data.rows import RowFault, kind_of

REFERENCE = "\0reference"
"""Column of the reference as one of the options; no file can hold this name."""
_HEAD = re.compile(r"^options?:\s*", re.IGNORECASE | re.MULTILINE)
_ANSWER_FORMAT = re.compile(r"answer format:\s*(\S+(?:/\S+)+)", re.IGNORECASE)
_LABEL = re.compile(r"\(?([A-Z])[).:]")


def find_options(
    wanted: str | tuple[str, ...], values: Mapping[str, Any], columns: Columns
) -> tuple[dict[str, Any], tuple[str, ...], Columns]:
    """(values with the reference written as an option, the options, the columns to read them with)."""
    options = options_of(wanted, values)
    if len(options) < 2:
        raise RowFault(f"{len(options)} options", "at least two", "Mend the row.", "options")
    field = next((ours for ours in ("completion", "output") if ours in columns), None)
    if field:
        value = columns.value(field, values)
    else:
        value = look_up(next((name for name in NAMES["output"] if name in values), "completion"), values)
    reference, options = _reference(value, options)
    return {**values, REFERENCE: reference}, options, columns.reading_answer_from(REFERENCE)


def options_of(wanted: str | tuple[str, ...], values: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of a row: the fixed ones, or those that the column holds."""
    return wanted if not isinstance(wanted, str) else _of_column(wanted, look_up(wanted, values))


def without_options(text: str) -> str:
    """The text without the block of options at its end (`Options:` and one per line)."""
    heads = list(_HEAD.finditer(text))
    if not heads or "\n\n" in text[heads[-1].end() :].strip("\n"):
        return text
    return text[: heads[-1].start()].rstrip()


def _of_column(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, str) and item.strip() for item in value):
            raise RowFault("an option that is not a text", "a list of texts", "Mend the row.", name)
        return tuple(value)
    if not isinstance(value, str):
        raise RowFault(kind_of(value), "a list of texts, or a text that carries the options", "Mend the row.", name)
    return _of_text(name, value)


def _of_text(name: str, text: str) -> tuple[str, ...]:
    if found := _ANSWER_FORMAT.search(text):
        return tuple(found.group(1).split("/"))
    heads = list(_HEAD.finditer(text))
    if not heads:
        raise RowFault(
            "a text without options",
            "`Options:` and one option per line, or `Answer format: a/b`",
            "Mend the row.",
            name,
        )
    block = text[heads[-1].end() :].strip("\n").split("\n\n")[0]
    return tuple(line.strip().removeprefix("- ").strip() for line in block.split("\n") if line.strip())


def _reference(value: Any, options: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The reference as one of the options: itself, an index from 0, or the letter by which the options are labelled.

    With letters the options become the labels as the reference writes them: `(C)` is scored against `(A)`, `(B)`, ...
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return options[value], options
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, str):
        if value in options:
            return value, options
        labels = [_LABEL.match(option) for option in options]
        letters = [found.group(1) for found in labels if found]
        bare = value.strip().strip("().:")
        if len(letters) == len(options) == len(set(letters)) and bare in letters:
            return value, tuple(value.replace(bare, letter, 1) for letter in letters)
    raise RowFault(
        f"{kind_of(value)} as the answer, none of {len(options)} options",
        "one of the options, or its index from 0",
        "Mend the row.",
        "options",
    )
