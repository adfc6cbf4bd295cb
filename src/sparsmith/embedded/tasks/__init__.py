"""Seeded instruction tasks with exact answers, in three domains: data for a demo, a test or a comparison.

    rows = generate("train", per_task=200, seed=0)
    {"prompt": "34 + 5 =", "completion": "39", "domain": "maths", "task": "add", "level": 2}

Every answer is computed, or rests on a closed list in `words.py`. Which side of the split a question is on depends on
the question alone, so no seed and no size can bring a held-out question into training. A row depends only on
(seed, task, index); asking for more rows of a task adds to those there were. Pure Python: no torch, no download.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from sparsmith.durable import write_text
from sparsmith.embedded.tasks import code, maths, text
from sparsmith.embedded.tasks.task import HELD_OUT, LEVELS, SPLITS, TRAIN, Question, Task, split_of
from sparsmith.errors import UsageError

__all__ = ["DOMAINS", "LEVELS", "SPLITS", "TASKS", "generate", "write_jsonl"]

TASKS: tuple[Task, ...] = (*maths.TASKS, *text.TASKS, *code.TASKS)
DOMAINS: tuple[str, ...] = (maths.DOMAIN, text.DOMAIN, code.DOMAIN)
_PATIENCE = 10  # draws of questions already asked, before a small task may repeat one

Row = dict[str, Any]


def generate(
    split: str,
    *,
    per_task: int | None = None,
    total: int | None = None,
    seed: int = 0,
    levels: Sequence[int] = LEVELS,
    domains: Sequence[str] = DOMAINS,
) -> list[Row]:
    """Rows `{prompt, completion, domain, task, level}` in a shuffled order.

    Questions of a task differ from each other as long as the task has enough of them on this side of the split.

    Args:
        split: `train` or `held_out`.
        per_task: rows of each kind of task; or
        total: rows altogether, shared equally by the domains, and in a domain by its kinds.
        seed: one number for the whole; another seed gives other rows of the same kinds.
        levels: the difficulties, in equal parts, of 1 (easy) to 3.
        domains: which of `maths`, `text` and `code`.

    Raises:
        UsageError: an unknown split, level or domain, or not exactly one of `per_task` and `total`.
    """
    _check_among("split", [split], SPLITS)
    _check_among("levels", levels, LEVELS)
    _check_among("domains", domains, DOMAINS)
    if (per_task is None) == (total is None):
        raise UsageError("generate", f"per_task={per_task}, total={total}", "exactly one of them", "Give one number.")
    rows: list[Row] = []
    shares = [per_task or 0] * len(domains) if total is None else _shares(total, len(domains))
    for domain, share in zip(domains, shares, strict=True):
        tasks = [task for task in TASKS if task.domain == domain]
        counts = [share] * len(tasks) if total is None else _shares(share, len(tasks))
        for task, count in zip(tasks, counts, strict=True):
            rows.extend(_rows_of(task, split, count, seed, tuple(levels)))
    Random(f"{seed}|{split}|order").shuffle(rows)
    return rows


def write_jsonl(
    folder: str | Path, *, seed: int = 0, train: int = 6000, held_out: int = 600, levels: Sequence[int] = LEVELS
) -> dict[str, Path]:
    """Write `train.jsonl` and `held_out.jsonl`, each with the given number of rows; returns their paths by split."""
    paths = {}
    for split, total in ((TRAIN, train), (HELD_OUT, held_out)):
        lines = [json.dumps(row) for row in generate(split, total=total, seed=seed, levels=levels)]
        paths[split] = Path(folder) / f"{split}.jsonl"
        write_text(paths[split], "\n".join(lines) + "\n")
    return paths


def _rows_of(task: Task, split: str, count: int, seed: int, levels: tuple[int, ...]) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    index = repeats = 0
    while len(rows) < count:
        level = levels[len(rows) % len(levels)]
        question = _draw(task, split, level, Random(f"{seed}|{task.name}|{index}"))
        index += 1
        if question.content in seen and repeats < _PATIENCE:
            repeats += 1
            continue
        repeats = 0
        seen.add(question.content)
        rows.append(
            {
                "prompt": question.prompt,
                "completion": question.completion,
                "domain": task.domain,
                "task": task.name,
                "level": level,
            }
        )
    return rows


def _draw(task: Task, split: str, level: int, random: Random) -> Question:
    """The first question drawn that lies on the wanted side."""
    while True:
        question = task.ask(random, level)
        if split_of(task.name, question.content) == split:
            return question


def _shares(total: int, parts: int) -> list[int]:
    """`total` in near-equal whole parts, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _check_among(name: str, given: Sequence, known: Sequence) -> None:
    strange = [value for value in given if value not in known]
    if strange or not given:
        raise UsageError(name, repr(strange or given), f"one or more of {list(known)}", "See `generate`'s arguments.")
