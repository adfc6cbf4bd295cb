"""The templates of a task file, in Jinja's sandbox: a file that someone sent must not run code, and the harness renders without one.

A text is the name of a column, or a template over the row's columns. Options are a list of texts, a column that holds one, or a template
that writes one (`['true', 'false']`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparsmith.data.rows import kind_of, one_line
from sparsmith.errors import DataError

PLACE = "\0place"
"""The column that holds a row's `file:line`; no file can hold this name."""
_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

Row = Mapping[str, Any]


def find_fault(text: str) -> str | None:
    """What is wrong with a template's syntax, in one line, or None."""
    try:
        _SANDBOX.parse(text)
    except TemplateError as fault:
        return one_line(str(fault))
    return None


@cache
def _template(text: str) -> Template:
    return _SANDBOX.from_string(text)


def render(text: str, row: Row, where: str) -> Any:
    """The column's value, or the rendered template.

    Args:
        where: the key of the task file, for messages.

    Raises:
        DataError: a column that the row lacks, or a template that cannot be rendered from it; the row is named.
    """
    if text in row:
        return row[text]
    try:
        return _template(text).render({key: value for key, value in row.items() if key != PLACE})
    except RecursionError:
        raise
    except Exception as fault:  # whatever a template's expression can do wrong with a value
        raise DataError(
            f"{row[PLACE]}: {where}",
            one_line(f"{type(fault).__name__}: {fault}"),
            "a row that the task's template can be written from",
            f"Mend the row, or `{where}` of the task file.",
        ) from None


def text_of(text: str, where: str) -> Callable[[Row], str]:
    """A function of a row that gives a text that is not blank."""

    def read(row: Row) -> str:
        value = render(text, row, where)
        if not isinstance(value, str) or not value.strip():
            raise _fault(row, where, value, "text")
        return value

    return read


def options_of(wanted: str | list[str], where: str) -> Callable[[Row], list[str]]:
    """A function of a row that gives its options."""

    def read(row: Row) -> list[str]:
        value = wanted if isinstance(wanted, list) else render(wanted, row, where)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise _fault(row, where, value, "a list of options") from None
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one for one in value):
            raise _fault(row, where, value, "a list of two options or more")
        if len(set(value)) < len(value):
            raise _fault(row, where, value, "options that differ")
        return value

    return read


def answer_of(text: str, options: Callable[[Row], list[str]], where: str) -> Callable[[Row], int]:
    """A function of a row that gives the index of the right option: it is written as the option, or as its index from 0."""

    def read(row: Row) -> int:
        value, known = render(text, row, where), options(row)
        if isinstance(value, str) and value in known:
            return known.index(value)
        index = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(known):
            return index
        raise _fault(row, where, value, f"one of {known}, or its index from 0")

    return read


def target_of(text: str, where: str) -> Callable[[Row], str | list[str]]:
    """A function of a row that gives the text to be written, or the list of texts of which each is right."""

    def read(row: Row) -> str | list[str]:
        value = render(text, row, where)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(isinstance(one, str) and one.strip() for one in listed):
            raise _fault(row, where, value, "a text, or a list of texts")
        return value

    return read


def _fault(row: Row, where: str, value: Any, expected: str) -> DataError:
    mend = f"Mend the row, or `{where}` of the task file."
    return DataError(f"{row[PLACE]}: {where}", kind_of(value), expected, mend)
