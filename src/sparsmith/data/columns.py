"""`columns`: from the names of a file to ours, or through a template such as `"{question}\\nOptions: {options}"`.

A plain name must hold a text: numbers, booleans and lists are never turned into text unseen. A template does it openly: numbers as
written, booleans as `true` / `false`, a list of texts one per line. `{choices[0]}` and `{answer.text}` reach into lists and
objects; `{{` and `}}` are braces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from sparsmith.data.rows import RowFault, kind_of
from sparsmith.errors import DataError, nearest
from sparsmith.recipe.mixture import TaskSource
from sparsmith.recipe.sources import Source

OUR_FIELDS = ("prompt", "completion", "system", "text", "messages", "instruction", "input", "output")
_STEP = re.compile(r"\[(\d+)\]|\.([^.\[\]]+)")


class Columns:
    """The compiled `columns` of one source.

    Args:
        any_field: the fields are those of templates, and not of the formats that the reader knows.
    """

    def __init__(self, mapping: Mapping[str, str], source: str, any_field: bool = False) -> None:
        for ours in mapping:
            if ours not in OUR_FIELDS and not any_field:
                raise DataError(
                    f"{source}:columns", f"the field `{ours}`", "a field of ours", nearest(ours, OUR_FIELDS)
                )
        self._answering: Columns | None = None
        self.mapping = dict(mapping)
        self.templates = {ours: parse_template(text, f"{source}:columns.{ours}") for ours, text in mapping.items()}

    def reading_answer_from(self, column: str) -> Columns:
        """The same, with the answer of every format in `column`."""
        if self._answering is None:
            self._answering = Columns({}, "")
            self._answering.mapping = {**self.mapping, "output": column, "completion": column}
            self._answering.templates = {**self.templates, "output": None, "completion": None}
        return self._answering

    def __contains__(self, ours: str) -> bool:
        return ours in self.mapping

    @classmethod
    def of(cls, source: Source) -> Columns:
        """Those of a source."""
        return cls(source.columns, source.name, any_field=isinstance(source, TaskSource) and source.format == "auto")

    @property
    def positional(self) -> bool:
        """True where a column is named by its position."""
        names = [name for parts in self.templates.values() if parts for _, name in parts if name]
        return any(name.isdigit() for name in [*self.mapping.values(), *names])

    def value(self, ours: str, values: Mapping[str, Any]) -> Any:
        """The value of our field in a row."""
        theirs = self.mapping[ours]
        if theirs in values:
            return values[theirs]
        parts = self.templates[ours]
        if parts is None:
            return look_up(theirs, values)
        return "".join(text + ("" if name is None else as_text(look_up(name, values), name)) for text, name in parts)


def parse_template(text: str, where: str) -> list[tuple[str, str | None]] | None:
    """(literal, column or None) pairs of a template; None for a plain column name."""
    if "{" not in text:
        return None
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as fault:
        raise DataError(
            where, f"a template with a fault ({fault})", "`{column}`, braces doubled", "Mend the template."
        ) from None
    if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
        raise DataError(where, "`{}`, `:` or `!` in a template", "`{column}`", "Name the column, without a format.")
    return [(literal, name) for literal, name, _, _ in parsed]


def look_up(name: str, values: Mapping[str, Any]) -> Any:
    """The value of a column, or inside it (`choices[0]`, `answer.text`)."""
    if name in values:
        return values[name]
    head = re.split(r"[.\[]", name, maxsplit=1)[0]
    steps = name[len(head) :]
    if head not in values or "".join(found.group() for found in _STEP.finditer(steps)) != steps:
        known = [str(key) for key in values]
        raise RowFault(
            f"no column `{name}`", f"a row with `{name}`", nearest(name, known) if known else "Fill the row.", name
        )
    value = values[head]
    for found in _STEP.finditer(steps):
        try:
            value = value[int(found.group(1))] if found.group(1) else value[found.group(2)]
        except (KeyError, IndexError, TypeError):
            raise RowFault(f"nothing at `{name}`", "a value there", "Mend the row or the template.", name) from None
    return value


def as_text(value: Any, name: str) -> str:
    """A value as a template writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise RowFault(kind_of(value), "a text, a number, a boolean or a list of texts", "Mend the row.", name)
