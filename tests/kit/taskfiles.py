"""Small task files and their rows, written on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CHOOSE: dict[str, Any] = {
    "task": "colours",
    "dataset_kwargs": {"data_files": {"train": "colours_train.jsonl", "test": "colours_test.jsonl"}},
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{q}}\nA:",
    "doc_to_choice": ["red", "blue"],
    "doc_to_target": "a",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
}
WRITE: dict[str, Any] = {
    "task": "letters",
    "dataset_kwargs": {"data_files": {"train": "letters_train.jsonl", "test": "letters_test.jsonl"}},
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "after {{q}} comes",
    "doc_to_target": "a",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}


def write_task(folder: Path, base: dict[str, Any], **changes: Any) -> Path:
    """A task file; a change of None takes the key out."""
    config = {key: value for key, value in {**base, **changes}.items() if value is not None}
    path = folder / f"{config.get('task', 'task')}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A jsonl file of rows."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def colours(folder: Path, scored: int = 6, pool: int = 8, **changes: Any) -> Path:
    """The choosing task with its rows beside it."""
    sides = ("red", "blue")
    write_rows(folder, "colours_test", [{"q": f"test {n}", "a": sides[n % 2]} for n in range(scored)])
    write_rows(folder, "colours_train", [{"q": f"train {n}", "a": sides[n % 2]} for n in range(pool)])
    return write_task(folder, CHOOSE, **changes)
