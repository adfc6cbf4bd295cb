"""Checks between the groups of a recipe, and against the disk. They read the raw data, so that they also speak when another part is
faulty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsmith.errors import RecipeError, RecipeErrors, nearest
from sparsmith.recipe import paths
from sparsmith.recipe.entries import protocol_entries, source_entries, task_entries
from sparsmith.recipe.faults import show
from sparsmith.recipe.templates import is_file_name, load_templates
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
    _templates(tree, base_dir, check_paths)
    if check_paths:
        _model_path(tree, base_dir)
        for keys, source in (*source_entries(tree), *protocol_entries(tree)):
            _source_path(tree, keys, source, base_dir)
        _output(tree, base_dir)


def _unique_names(tree: Tree) -> None:
    for group in ("train", "eval"):
        first: dict[str, str] = {}
        for keys, source in source_entries(tree, (group,)):
            name = source.get("name")
            if isinstance(name, str) and name in first:
                mend = f"Rename it; the first stands at {first[name]}."
                tree.fault((*keys, "name"), f"`{name}` a second time", "a name of its own", mend)
            elif isinstance(name, str):
                first[name] = tree.place((*keys, "name"))


def _no_leak(tree: Tree, splits: Splits) -> None:
    """A file that is split by `heldout` anywhere must be split in the same way everywhere."""
    for keys, source in (*source_entries(tree), *protocol_entries(tree)):
        path, share = source.get("path"), source.get("heldout", 0.0)
        if not isinstance(path, str) or not isinstance(share, int | float):
            continue
        known, place = splits.setdefault(path, (share, tree.place(keys)))
        if known != share:
            found = f"`{share}` (at {place}: `{known}`)"
            expected = "one share for every source of this file, or evaluation rows would be trained on"
            tree.fault((*keys, "heldout"), found, expected, "Give both sources the same `heldout`.")
    _one_prompt(tree)


def _one_prompt(tree: Tree) -> None:
    """The side of a task's row is drawn from `columns.prompt`, so that another source of the file must read the same text."""
    for keys, task in task_entries(tree):
        mine = _prompt_of(task)
        if not task.get("heldout") or mine is None:
            continue
        for other_keys, other in source_entries(tree, ("eval",)):
            theirs = _prompt_of(other)
            if other.get("path") == task.get("path") and other.get("heldout") and theirs not in (None, mine):
                expected = f"{show(theirs)}, by which {tree.place(other_keys)} draws its side"
                mend = "Give both sources the same `columns.prompt`."
                tree.fault((*keys, "columns", "prompt"), show(mine), expected, mend)


def _prompt_of(source: dict[str, Any]) -> Any:
    columns = source.get("columns")
    return columns.get("prompt") if isinstance(columns, dict) else None


def _templates(tree: Tree, base_dir: Path, check_paths: bool) -> None:
    """The template files of a mixture's tasks: each is read whole, and its faults are told with the recipe's."""
    told = set()
    for keys, task in task_entries(tree):
        name = task.get("templates")
        if not isinstance(name, str) or not name or (is_file_name(name) and not check_paths):
            continue
        try:
            found = load_templates(name, base_dir)
        except RecipeErrors as errors:
            for fault in errors.faults:
                if fault.where == name:  # the set as a whole; the rest names its line of the file
                    tree.fault((*keys, "templates"), f"`{name}`: {fault.found}", fault.expected, fault.mend)
                elif (fault.where, fault.found) not in told:
                    told.add((fault.where, fault.found))
                    tree.faults.append(RecipeError(fault.where, fault.found, fault.expected, fault.mend))
            continue
        if task.get("options") is not None and not found.shows_options:
            expected = f"a set that shows them: `{name}` has no `{{options_}}`"
            tree.fault((*keys, "options"), "options, which have no effect here", expected, "Change one of the two.")
        fixed = task.get("fixed")
        for field in fixed if isinstance(fixed, dict) else ():
            if field not in found.fields:
                hint = nearest(field, found.fields)
                tree.fault(
                    (*keys, "fixed", field), "a field, which has no effect here", "a field of the templates", hint
                )


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
    inputs += [((*source_keys, "path"), source.get("path")) for source_keys, source in source_entries(tree)]
    for input_keys, value in inputs:
        if not isinstance(value, str) or value == paths.EMBEDDED or not paths.exists(paths.resolve(value, base_dir)):
            continue
        given = paths.resolve(value, base_dir).resolve()
        if given == output or given in output.parents or output in given.parents:
            found = f"{show(text)}, which meets {'.'.join(map(str, input_keys))} ({given})"
            tree.fault(keys, found, "a folder apart from everything that is read", "Choose another folder.")
            return
