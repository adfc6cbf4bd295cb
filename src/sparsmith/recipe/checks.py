"""Checks between the groups of a recipe, and against the disk. They read the raw data, so that they also speak when another part is
faulty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsmith.errors import nearest
from sparsmith.recipe import paths
from sparsmith.recipe.faults import show
from sparsmith.recipe.yaml_tree import Path as Keys
from sparsmith.recipe.yaml_tree import Tree

Splits = dict[str, tuple[Any, str]]
"""File -> the share that is held out of it, and where that is said first."""


def check(tree: Tree, base_dir: Path, check_paths: bool, splits: Splits | None = None) -> None:
    """Add the faults that a single group cannot see.

    Args:
        splits: shared by the stages of one recipe.
    """
    _unique_names(tree)
    _no_leak(tree, {} if splits is None else splits)
    _eval_every(tree)
    if check_paths:
        _model_path(tree, base_dir)
        for keys, source in (*_sources(tree), *_protocol_sources(tree)):
            _source_path(tree, keys, source, base_dir)
        _output(tree, base_dir)


def _sources(tree: Tree, groups: tuple[str, ...] = ("train", "eval")) -> Iterator[tuple[Keys, dict[str, Any]]]:
    for group in groups:
        entries = tree.get(("data", group))
        for index, source in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(source, dict):
                yield ("data", group, index), source


def _protocol_sources(tree: Tree) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """Those of single tasks and of continued pre-training."""
    tasks = tree.get(("protocol", "tasks"))
    for index, task in enumerate(tasks if isinstance(tasks, list) else []):
        for side in ("train", "eval"):
            if isinstance(task, dict) and isinstance(task.get(side), dict):
                yield ("protocol", "tasks", index, side), task[side]
    sides = tree.get(("protocol", "sides"))
    for name, side in (sides if isinstance(sides, dict) else {}).items():
        start = side.get("start") if isinstance(side, dict) else None
        rows = start.get("train") if isinstance(start, dict) else None
        for index, source in enumerate(rows if isinstance(rows, list) else []):
            if isinstance(source, dict):
                yield ("protocol", "sides", name, "start", "train", index), source


def _unique_names(tree: Tree) -> None:
    for group in ("train", "eval"):
        first: dict[str, str] = {}
        for keys, source in _sources(tree, (group,)):
            name = source.get("name")
            if isinstance(name, str) and name in first:
                mend = f"Rename it; the first stands at {first[name]}."
                tree.fault((*keys, "name"), f"`{name}` a second time", "a name of its own", mend)
            elif isinstance(name, str):
                first[name] = tree.place((*keys, "name"))


def _no_leak(tree: Tree, splits: Splits) -> None:
    """A file that is split by `heldout` anywhere must be split in the same way everywhere."""
    for keys, source in (*_sources(tree), *_protocol_sources(tree)):
        path, share = source.get("path"), source.get("heldout", 0.0)
        if not isinstance(path, str) or not isinstance(share, int | float):
            continue
        known, place = splits.setdefault(path, (share, tree.place(keys)))
        if known != share:
            found = f"`{share}` (at {place}: `{known}`)"
            expected = "one share for every source of this file, or evaluation rows would be trained on"
            tree.fault((*keys, "heldout"), found, expected, "Give both sources the same `heldout`.")


def _eval_every(tree: Tree) -> None:
    if isinstance(tree.get(("train", "eval_every")), int) and not tree.get(("data", "eval")):
        found = f"`{tree.get(('train', 'eval_every'))}`, which has no effect here"
        tree.fault(
            ("train", "eval_every"), found, "sources under data.eval", "Add `data.eval`, or remove `eval_every`."
        )


def _model_path(tree: Tree, base_dir: Path) -> None:
    keys: Keys = ("model", "path")
    text = tree.get(keys)
    if not isinstance(text, str) or not text:
        return
    hub = paths.is_hub_id(text, base_dir)
    if not hub and tree.get(("model", "revision")) is not None:
        found = f"{show(tree.get(('model', 'revision')))}, which has no effect here"
        tree.fault(("model", "revision"), found, "a hub id as model.path", "Remove `revision`.")
    if hub or text == paths.EMBEDDED:
        return
    folder = paths.resolve(text, base_dir)
    if not paths.exists(folder):
        expected = f"a folder (looked at {folder}), a hub id `owner/name`, or `{paths.EMBEDDED}`"
        hint = nearest(text, (paths.EMBEDDED,))
        hint = hint if hint.startswith("Did") else _neighbour(folder)
        tree.fault(keys, f"{show(text)}, which does not exist", expected, hint)
    elif not paths.exists(folder / "config.json"):
        expected = "a folder with a Hugging Face checkpoint"
        tree.fault(keys, f"{show(text)}, which holds no config.json", expected, "Point to the checkpoint's folder.")


def _source_path(tree: Tree, keys: Keys, source: dict[str, Any], base_dir: Path) -> None:
    text, keys_path = source.get("path"), (*keys, "path")
    if not isinstance(text, str) or not text or paths.is_hub_id(text, base_dir):
        return
    file = paths.resolve(text, base_dir)
    if not paths.exists(file):
        expected = f"a file or folder (looked at {file}), or a hub data set `owner/name`"
        tree.fault(keys_path, f"{show(text)}, which does not exist", expected, _neighbour(file))
    elif source.get("split") is not None and not file.is_dir():
        found = f"{show(source['split'])}, which has no effect here"
        tree.fault((*keys, "split"), found, "a hub data set or a folder as path", "Remove `split`.")


def _neighbour(path: Path) -> str:
    """The name in the nearest existing folder that looks like the missing one."""
    for folder in path.parents:
        if paths.exists(folder):
            missing = path.parts[len(folder.parts)]
            try:
                names = sorted(entry.name for entry in folder.iterdir())[:1000]
            except OSError:
                break
            hint = nearest(missing, names)
            return hint if hint.startswith("Did") else f"`{folder}` holds nothing named `{missing}`."
    return "Check the path."


def _output(tree: Tree, base_dir: Path) -> None:
    """The run's folder must not meet anything that the run reads."""
    keys: Keys = ("output",)
    text = tree.get(keys)
    if not isinstance(text, str) or not text:
        return
    try:
        output = paths.resolve(text, Path.cwd()).resolve()
        is_file = output.is_file()
    except (OSError, ValueError, RuntimeError):
        tree.fault(keys, show(text), "a path that can be made", "Choose another folder.")
        return
    if is_file or output == Path.cwd() or output in Path.cwd().parents:
        expected = "a folder of its own for the run"
        tree.fault(keys, f"{show(text)}, which is {output}", expected, "Choose a new folder, such as runs/first.")
        return
    inputs: list[tuple[Keys, Any]] = [(("model", "path"), tree.get(("model", "path")))]
    inputs += [((*source_keys, "path"), source.get("path")) for source_keys, source in _sources(tree)]
    for input_keys, value in inputs:
        if not isinstance(value, str) or value == paths.EMBEDDED or not paths.exists(paths.resolve(value, base_dir)):
            continue
        given = paths.resolve(value, base_dir).resolve()
        if given == output or given in output.parents or output in given.parents:
            found = f"{show(text)}, which meets {'.'.join(map(str, input_keys))} ({given})"
            tree.fault(keys, found, "a folder apart from everything that is read", "Choose another folder.")
            return
