"""Settings from the command line: `train.steps=50`, `methods.0.top_k=1`."""

from __future__ import annotations

from collections.abc import Iterable

from sparsmith.errors import RecipeError
from sparsmith.recipe.yaml_tree import Path, Tree, parse_value


def apply_overrides(tree: Tree, overrides: Iterable[str]) -> None:
    """Put each `key=value` into the tree. An unknown key is left to the validation, which names the nearest one."""
    for override in overrides:
        try:
            _apply(tree, override)
        except RecipeError as error:
            tree.faults.append(error)


def _apply(tree: Tree, override: str) -> None:
    key, equals, text = override.partition("=")
    place = f"command line `{_short(override)}`"
    if not equals or not all(key.split(".")):
        raise RecipeError(place, "no key and value", "`key=value`, such as train.steps=50", "Write key, `=` and value.")
    path: Path = tuple(int(part) if part.isdecimal() and len(part) < 6 else part for part in key.split("."))
    value = parse_value(text, place)
    if "#" in text and not isinstance(value, dict | list) and text.lstrip()[0] not in "'\"":
        raise RecipeError(
            f"{place}: {key}", "an unquoted `#`, which starts a comment", "the value in quotes", "Add quotes."
        )
    if not isinstance(tree.data, dict):
        return  # the file holds no settings; that fault is told once, by the validation
    for length in range(1, len(path)):
        _open_group(tree, path[:length], place)
    _check_slot(tree, path, place)
    tree.set(path, value, place)


def _open_group(tree: Tree, path: Path, place: str) -> None:
    """Make sure that a group or list stands at the path; a missing group is made."""
    _check_slot(tree, path, place)
    value = tree.get(path)
    if value is None:
        tree.set(path, {}, place)
    elif not isinstance(value, dict | list):
        raise RecipeError(
            f"{place}: {'.'.join(map(str, path))}", "a single value", "a group of settings", "Set the value itself."
        )


def _check_slot(tree: Tree, path: Path, place: str) -> None:
    """The last part of the path must be a key of a group, or the index of an entry of a list."""
    parent, last = tree.get(path[:-1]), path[-1]
    where = f"{place}: {'.'.join(map(str, path))}"
    if isinstance(parent, list):
        if not isinstance(last, int) or last >= len(parent):
            expected = f"an index from 0 to {len(parent) - 1}" if parent else "an empty list, which has no entries"
            raise RecipeError(where, f"`{last}`", expected, "Count the entries of the list from 0.")
    elif isinstance(last, int):
        raise RecipeError(where, f"the index `{last}`", "a name, as this is no list", "Use the key's name.")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
