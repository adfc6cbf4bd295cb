"""The rows of a mixture's task without its templates: what is asked and what is answered, for whoever compares contents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparsmith.data.fields import TaskFields, TaskRow
from sparsmith.data.messages import Messages
from sparsmith.data.sources import RowSet, read_rows
from sparsmith.recipe.mixture import TaskSource
from sparsmith.recipe.templates import load_templates


def read_task(task: TaskSource, on_bad_row: str, base_dir: Path | str, seed: int) -> RowSet:
    """The task's rows as conversations of two: the fields that its templates ask with (options too), and those that answer."""
    templates = load_templates(task.templates, Path(base_dir))
    asked = tuple(dict.fromkeys(name for one in templates.templates for name in one.asked))
    fields = TaskFields(task, templates.fields)
    found = read_rows(task, on_bad_row, base_dir, seed, fields=fields)  # type: ignore[arg-type]
    found.rows = [row if row.fields is None else replace(row, messages=_plain(row.fields, asked)) for row in found.rows]
    return found


def _plain(row: TaskRow, asked: tuple[str, ...]) -> Messages:
    question = [row.fields[name] for name in asked if name in row.fields]
    question += list(row.choices.texts) if row.choices else []
    answer = [text for name, text in row.fields.items() if name not in asked]
    return [
        {"role": "user", "content": "\n".join(question)},
        {"role": "assistant", "content": "\n".join(answer or question[-1:])},
    ]
