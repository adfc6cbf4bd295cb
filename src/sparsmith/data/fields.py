"""What the templates of a mixture's task are filled with: the fields of a row, as texts.

A field is, in this order: one of `fixed`; one of `columns`; with a `format`, the row's prompt, completion or system message; the row's
column of that name. A field that a row does not have is a fault of the row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsmith.data.choices import Choices, choices_of
from sparsmith.data.columns import Columns
from sparsmith.data.messages import check_text, to_messages
from sparsmith.data.options import options_of, without_options
from sparsmith.data.rows import Row, RowFault
from sparsmith.errors import nearest
from sparsmith.recipe.mixture import TaskSource

ANSWER = "answer"
"""The field that is one of the options, where a task has some."""


@dataclass(frozen=True)
class TaskRow:
    """A row before it is rendered."""

    fields: Mapping[str, str]
    identity: int
    """A number of the row's own text, from which its draws start; the same whatever stands around it."""
    choices: Choices | None = None
    prompt: str = ""
    """The text by which the side of the row is drawn, where the task has sides."""
    system: str = ""


class TaskFields:
    """Reads the rows of a task.

    Args:
        needed: the fields of its templates.
    """

    def __init__(self, task: TaskSource, needed: tuple[str, ...]) -> None:
        self.task, self.needed = task, needed
        self._seen: dict[str, int] = {}

    def read(self, row: Row, columns: Columns) -> TaskRow:
        """The row's fields.

        Raises:
            RowFault: one is missing, empty or no text, or the answer is none of the options.
        """
        messages = self._messages(row, columns)
        fields = {
            name: self._value(name, row, columns, messages)
            for name in self.needed
            if name != ANSWER or not self.task.options
        }
        choices = None
        if self.task.options is not None:
            options = options_of(self.task.options, row.values)
            choices = choices_of(options, self._raw(ANSWER, row, columns, messages))
            fields = {name: check_text(without_options(text), name, name) for name, text in fields.items()}
            fields[ANSWER] = choices.texts[choices.right]
        prompt = ""
        if self.task.part != "all":
            prompt = messages["prompt"] if messages else self._text("prompt", columns.value("prompt", row.values))
        return TaskRow(fields, self._identity(row), choices, prompt, messages.get("system", ""))

    def _messages(self, row: Row, columns: Columns) -> dict[str, str]:
        """Prompt and completion of a row in one of the known formats; nothing where its columns are the fields."""
        if self.task.format == "auto":
            return {}
        found = to_messages(self.task.format, row.values, columns)
        system = found[0]["content"] if found[0]["role"] == "system" else ""
        talk = found[1:] if system else found
        if len(talk) != 2:
            raise RowFault(f"{len(talk)} turns", "one question and one answer", "Remove the row.", "messages")
        made = {"prompt": talk[0]["content"], "completion": talk[1]["content"]}
        return {**made, "system": system} if system else made

    def _value(self, name: str, row: Row, columns: Columns, messages: Mapping[str, str]) -> str:
        return self._text(name, self._raw(name, row, columns, messages))

    def _raw(self, name: str, row: Row, columns: Columns, messages: Mapping[str, str]) -> Any:
        if name in self.task.fixed:
            return self.task.fixed[name]
        if self.task.format == "auto" and name in columns:
            return columns.value(name, row.values)
        if name in messages:
            return messages[name]
        if name in row.values:
            return row.values[name]
        known = list(dict.fromkeys([*columns.mapping, *messages, *map(str, row.values)]))
        hint = nearest(name, known) if known else "Fill the row."
        raise RowFault(
            f"no field `{name}`, which the templates `{self.task.templates}` need",
            "a column of that name, or one named in `columns`",
            hint,
            name,
        )

    def _text(self, name: str, value: Any) -> str:
        label = self.task.columns.get(name, name)
        return check_text(value, label, f"the field `{name}`")

    def _identity(self, row: Row) -> int:
        """Of equal rows each has its own, by their order."""
        digest = hashlib.sha256(row.raw.encode("utf-8", "backslashreplace")).hexdigest()
        count = self._seen[digest] = self._seen.get(digest, -1) + 1
        return int(hashlib.sha256(f"{digest}:{count}".encode()).hexdigest()[:15], 16)
