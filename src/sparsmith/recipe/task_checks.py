"""Checks between `model.task` and the rest of a recipe: what a classifier or an encoder-decoder needs, and what has no meaning for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsmith.recipe.entries import entries, source_entries
from sparsmith.recipe.yaml_tree import Path as Keys
from sparsmith.recipe.yaml_tree import Tree

TasksOf = Callable[[str], tuple[str, ...]]


def check_task(tree: Tree, tasks_of: TasksOf | None) -> None:
    """Add the faults. Reads the raw data, so that it also speaks when another part is faulty."""
    task = tree.get(("model", "task"))
    classifies = task == "seq_cls"
    _labels(tree, tree.get(("model", "num_labels")) if classifies else None, classifies)
    if not classifies:
        if tree.get(("train", "select")) is not None:
            _without_effect(tree, ("train", "select"), "task seq_cls")
        if task != "seq2seq":
            return
    if tasks_of is not None:
        _methods(tree, task, tasks_of)
    (_data if classifies else _pairs)(tree)


def _methods(tree: Tree, task: str, tasks_of: TasksOf) -> None:
    for keys, entry in entries(tree, ("methods",)):
        name = entry.get("method")
        tasks = tasks_of(name) if isinstance(name, str) else ()
        if tasks and task not in tasks:
            expected = f"a method that does the task {task} (at {tree.place(('model', 'task'))})"
            found = f"`{name}`, which does {' and '.join(tasks)}"
            tree.fault((*keys, "method"), found, expected, "Choose another method, or remove `model.task`.")


def _labels(tree: Tree, classes: Any, classifies: bool) -> None:
    for keys, source in source_entries(tree):
        labels = source.get("labels")
        if labels is None:
            continue
        if not classifies:
            _without_effect(tree, (*keys, "labels"), "task seq_cls")
        elif isinstance(labels, list) and isinstance(classes, int) and len(labels) != classes:
            expected = f"{classes}, as model.num_labels says (at {tree.place(('model', 'num_labels'))})"
            tree.fault((*keys, "labels"), f"{len(labels)} names", expected, "Name every class once, in order.")


def _pairs(tree: Tree) -> None:
    """What an encoder-decoder cannot do, or what has no meaning for it."""
    packing = "the encoder reads one prompt and the decoder one answer"
    _one_text_each(tree, packing, "an encoder's tokens are read and not predicted", "the encoder")


def _one_text_each(tree: Tree, packing: str, loss_on: str, reader: str) -> None:
    """Rows that stand alone and are read as a text; the arguments say why."""
    if tree.get(("data", "packing")) is True:
        tree.fault(("data", "packing"), "`true`", f"false, as {packing}", "Remove `packing`.")
    if tree.get(("data", "loss_on")) == "all":
        _without_effect(tree, ("data", "loss_on"), f"task causal_lm: {loss_on}")
    if tree.get(("data", "template")) == "chat":
        expected = f"a text with {{prompt}}, as {reader} reads a text and no conversation"
        tree.fault(("data", "template"), "`chat`", expected, "Write the template in the recipe, or remove it.")


def _data(tree: Tree) -> None:
    if tree.get(("data", "mixture")) is not None:
        found, expected = "`mixture`", "sources under `train`: the tasks of a mixture are answered in words"
        tree.fault(("data", "mixture"), found, expected, "Remove `mixture`, or `model.task`.")
    packing = "each text of a classifier is a row of its own with one class"
    _one_text_each(tree, packing, "a classifier learns no token", "a classifier")
    for keys, source in source_entries(tree):
        metrics = source.get("metrics")
        for index, metric in enumerate(metrics if isinstance(metrics, list) else []):
            if metric in ("rank", "exact_match"):
                mend = "Remove it: with `loss` a classifier's accuracy is measured too."
                tree.fault((*keys, "metrics", index), f"`{metric}`", "loss, as the task is seq_cls", mend)


def _without_effect(tree: Tree, keys: Keys, unless: str) -> None:
    name = keys[-1]
    tree.fault(keys, f"`{name}`, which has no effect here", unless, f"Remove `{name}`, or meet the condition.")
