"""The rows of a task: its files found below the data folder, read strictly, the shots kept apart from what is scored.

A file may lie in the folder itself, in a folder directly below it, or beside the task file (which comes last), with or without `.gz`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsmith.data import read_json, read_table
from sparsmith.data.files import list_files, read_bytes, without_mark
from sparsmith.data.rows import Reject, kind_of
from sparsmith.errors import DataError, UsageError
from sparsmith.evaluating.harness.task_files import TaskFile
from sparsmith.evaluating.harness.templates import PLACE
from sparsmith.seeds import numpy_generator

LIMIT_SEED = 0
"""`limit` takes the same rows whatever the seed, and those that a set of the same name and limit takes in a recipe."""


class Rows(list):
    """Rows as the harness asks for them: a list with the names of its columns."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(name for row in self for name in row)


@dataclass(frozen=True)
class TaskRows:
    """What one task scores, and what its shots are drawn from."""

    name: str
    group: str
    """The task file's name; equal to `name` unless the file makes a task of each subject."""
    scored: Rows
    pool: Rows
    """Empty where no shots are asked for."""
    removed: int = 0
    """Rows taken out of the pool because their question is also a scored one."""
    shots: int = 0
    """As asked for; fewer where the pool is short because rows were taken out of it (MMLU's dev rows hold some of its test rows)."""


def read_task_rows(
    task: TaskFile,
    folder: Path | None,
    *,
    shots: int,
    limit: int | None,
    prompt: Callable[[dict], str],
    shot_prompt: Callable[[dict], str],
) -> list[TaskRows]:
    """The rows of a task, or of each of its subjects.

    Args:
        folder: where the user's files lie; None where all lie beside the task file.
        shots: how many examples stand before each question; 0 reads no file for them.
        limit: at most this many scored rows of the file, drawn over all of it, in its order.
        prompt: the question of a row as it is asked, and `shot_prompt` as a shot shows it: by it a scored row is found in the pool.

    Raises:
        UsageError: a file that is missing or found twice, or too few rows for the shots.
        DataError: a row that cannot be read.
    """
    scored_path = find_file(task, task.config["test_split"], folder)
    every = _read(scored_path)
    pool: list[dict] = []
    if shots:
        pool_path = find_file(task, task.config["fewshot_split"], folder)
        if pool_path.samefile(scored_path):
            raise UsageError(
                str(pool_path), "the file that is scored", "another file for the shots", "Mend the task file."
            )
        pool = _read(pool_path)
    asked = {prompt(row) for row in every} if pool else set()
    clean = [row for row in pool if shot_prompt(row) not in asked]
    chosen = _limited(every, limit, task.name)
    if task.by is None:
        found = [TaskRows(task.name, task.name, Rows(chosen), Rows(clean), len(pool) - len(clean))]
    else:
        found = _by_column(task, chosen, pool, clean)
    for one in found:
        if len(one.pool) + one.removed < shots or (shots and not one.pool):
            raise UsageError(
                f"task {one.name}",
                f"{len(one.pool)} rows to draw {shots} shots from ({one.removed} left out: they are scored)",
                f"{shots} rows or more",
                "Ask for fewer shots.",
            )
    return [replace(one, shots=min(shots, len(one.pool))) for one in found]


def find_file(task: TaskFile, split: str, folder: Path | None) -> Path:
    """The file of a split.

    Raises:
        UsageError: no such file, or several.
    """
    name = task.files[split]
    names = (name, name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz")
    levels: list[list[Path]] = [] if folder is None else [[folder], sorted(c for c in folder.iterdir() if c.is_dir())]
    for level in [*levels, [task.path.parent]]:
        found = [place / one for place in level for one in names if (place / one).is_file()]
        if len(found) > 1:
            both = " and ".join(map(str, found))
            raise UsageError(
                f"task {task.name}", f"`{name}` twice: {both}", "one of it", "Name a folder that holds one."
            )
        if found:
            return found[0]
    where = "no data folder" if folder is None else f"no `{name}` (or .gz) in `{folder}` nor a folder below it"
    raise UsageError(
        f"task {task.name}",
        where,
        f"the file of the split `{split}`",
        "Name the folder of the files: --tasks-data DIR.",
    )


def _read(path: Path) -> list[dict]:
    (file,) = list_files(path, str(path))
    data, _ = read_bytes(file)
    if file.kind == "parquet":
        stream = read_table.read_parquet(data, file.shown)
    else:
        text = without_mark(data, file.shown)
        readers: dict[str, Callable[..., Any]] = {
            "json": read_json.read_json,
            "csv": read_table.read_csv,
            "tsv": read_table.read_tsv,
        }
        stream = readers.get(file.kind, read_json.read_jsonl)(text, file.shown)
    rows = []
    for row in stream:
        if isinstance(row, Reject):
            raise row.error
        rows.append({**row.values, PLACE: f"{row.file}:{row.line}"})
    if not rows:
        raise DataError(str(path), "no rows", "at least one", "Check the file.")
    return rows


def _limited(rows: list[dict], limit: int | None, name: str) -> list[dict]:
    if limit is None or limit >= len(rows):
        return rows
    order = numpy_generator(LIMIT_SEED, f"data.limit.{name}").permutation(len(rows))
    return [rows[index] for index in sorted(order[:limit].tolist())]


def _by_column(task: TaskFile, scored: list[dict], pool: list[dict], clean: list[dict]) -> list[TaskRows]:
    """A task for each value of the column; where the rows of the pool have no such column all share them."""
    assert task.by is not None
    column = task.by
    for row in scored:
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise DataError(
                f"{row[PLACE]}: {column}", kind_of(row.get(column)), "text, of `metadata.by`", "Mend the row."
            )
    own = any(column in row for row in pool)

    def part(rows: Sequence[dict], value: str) -> Rows:
        return Rows(row for row in rows if not own or row.get(column) == value)

    found = []
    for value in dict.fromkeys(row[column] for row in scored):
        mine = Rows(row for row in scored if row[column] == value)
        kept = part(clean, value)
        name = f"{task.name}_" + re.sub(r"\W+", "_", value).strip("_").lower()
        found.append(TaskRows(name, task.name, mine, kept, len(part(pool, value)) - len(kept)))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"task {task.name}", f"two values of `{column}` named `{twice}`", "one", "Mend the rows.")
    return found


def fingerprint(rows: Rows, prompts: Sequence[str]) -> str:
    """sha256 of the rows and the prompts they were asked with: two results may be paired only where it is equal."""
    data = [
        [{key: value for key, value in row.items() if key != PLACE}, asked]
        for row, asked in zip(rows, prompts, strict=True)
    ]
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
