"""Where the sources of a recipe stand in its raw data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsmith.recipe.yaml_tree import Path as Keys
from sparsmith.recipe.yaml_tree import Tree


def entries(tree: Tree, keys: Keys) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """The groups of the list at `keys`, each with its path."""
    found = tree.get(keys)
    for index, entry in enumerate(found if isinstance(found, list) else []):
        if isinstance(entry, dict):
            yield (*keys, index), entry


def task_entries(tree: Tree) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """The tasks of the mixture."""
    for keys, _ in entries(tree, ("data", "mixture", "submixtures")):
        yield from entries(tree, (*keys, "tasks"))


def source_entries(tree: Tree, groups: tuple[str, ...] = ("train", "eval")) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """The sources; a mixture's tasks belong to `train`."""
    for group in groups:
        yield from entries(tree, ("data", group))
        if group == "train":
            yield from task_entries(tree)


def protocol_entries(tree: Tree) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """The sources of a protocol's single tasks and of continued pre-training."""
    for keys, task in entries(tree, ("protocol", "tasks")):
        for side in ("train", "eval", "validation"):
            if isinstance(task.get(side), dict):
                yield (*keys, side), task[side]
    sides = tree.get(("protocol", "sides"))
    for name in sides if isinstance(sides, dict) else {}:
        yield from entries(tree, ("protocol", "sides", name, "start", "train"))
