"""The data of a recipe of several stages -> for each stage the data of a recipe of its own, whose faults still name their place in the
file (`recipe.yaml:14: stages.1.train.stpes`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from sparsmith.recipe.faults import report, show
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import GROUPS, Outline, Stage, StagedRecipe, name_of
from sparsmith.recipe.yaml_tree import Path, Tree, dotted

IN_PLACE_OF = {"train": "mixture", "mixture": "train"}
"""Of `data`: keys of which a stage's own takes the place of the top level's other."""


class StageTree(Tree):
    """One stage on top of the recipe's own groups."""

    def __init__(self, whole: Tree, index: int) -> None:
        self.whole, self.index = whole, index
        self.stage: dict[str, Any] = whole.data["stages"][index]
        data = {key: value for key, value in whole.data.items() if key not in ("stages", "methods")}
        for group in GROUPS:
            own = self.stage.get(group)
            if isinstance(own, dict):
                above = data.get(group)
                left = _without_replaced(above, own) if isinstance(above, dict) else {}
                data[group] = {**left, **own}
        if "methods" in self.stage:
            data["methods"] = self.stage["methods"]
        super().__init__(whole.name, data)

    def origin(self, path: Path) -> Path:
        """Where in the file the path of this stage's recipe stands."""
        if not path:
            return ("stages", self.index)
        own = self.stage.get(path[0]) if path[0] in GROUPS else None
        if path[0] == "methods":
            return ("stages", self.index, *path)
        if isinstance(own, dict) and (len(path) == 1 or path[1] in own or not self._above(path)):
            return ("stages", self.index, *path)
        return path

    def _above(self, path: Path) -> bool:
        group = self.whole.data.get(path[0])
        return isinstance(group, dict) and path[1] in group

    def place(self, path: Path) -> str:
        return self.whole.place(self.origin(path))

    def where(self, path: Path) -> str:
        return f"{self.place(path)}: {dotted(self.origin(path))}"


def _without_replaced(above: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The top level's keys without that in whose place the stage has another."""
    return {key: value for key, value in above.items() if IN_PLACE_OF.get(key) not in own or key in own}


def load_stages(
    tree: Tree, methods: Mapping[str, type], validated: Callable[[Tree], Recipe | None], check: Callable[[Tree], None]
) -> StagedRecipe | None:
    """Validate a recipe that holds `stages`; faults go to the tree, each once.

    Args:
        validated: reads a recipe of one stage. check: the checks between its groups and against the disk.
    """
    _check_outline(tree, methods)
    entries = tree.data["stages"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return None
    views = [StageTree(tree, index) for index in range(len(entries))]
    found = []
    for view in views:
        view.faults = list(tree.faults)
        known = len(view.faults)
        found.append(validated(view))
        check(view)
        told = {(fault.where, fault.found) for fault in tree.faults}
        tree.faults += [fault for fault in view.faults[known:] if (fault.where, fault.found) not in told]
    _without_effect(tree, entries)
    if tree.faults or not all(found):
        return None
    recipes = [recipe for recipe in found if recipe is not None]
    stages = tuple(
        Stage.model_construct(
            name=name_of(entry.get("name"), recipe.methods),
            **{key: getattr(recipe, key) for key in ("methods", *GROUPS)},
        )
        for entry, recipe in zip(entries, recipes, strict=True)
    )
    first = recipes[0]
    return StagedRecipe.model_construct(model=first.model, stages=stages, output=first.output)


def _check_outline(tree: Tree, methods: Mapping[str, type]) -> None:
    """Keys of the top and of the stages; `methods` stands in one place alone."""
    data = dict(tree.data)
    if "methods" in data:
        tree.fault(("methods",), "`methods` beside `stages`", "one of the two", "Move `methods` into a stage.")
        del data["methods"]
    try:
        Outline.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        report(tree, error.errors(), Outline, methods)


def _without_effect(tree: Tree, entries: list[dict[str, Any]]) -> None:
    """A key of the top level that every stage has for itself is read by none."""
    for group in GROUPS:
        above = tree.data.get(group)
        if not isinstance(above, dict) or not above:
            continue
        own = [set(entry[group]) if isinstance(entry.get(group), dict) else set() for entry in entries]
        idle = [key for key in above if all(key in keys or IN_PLACE_OF.get(key) in keys for keys in own)]
        expected = "a setting that at least one stage leaves out"
        if len(idle) == len(above):
            tree.fault((group,), f"`{group}`, which has no effect here", expected, f"Remove `{group}`.")
            continue
        for key in idle:
            found = f"{show(above[key])}, which has no effect here"
            tree.fault((group, key), found, expected, f"Remove `{key}`: every stage has its own.")
