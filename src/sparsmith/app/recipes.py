"""What needs a recipe and no weights: load, plan, show the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import recipe as recipes
from sparsmith.methods import registry
from sparsmith.recipe.schema import Recipe

if TYPE_CHECKING:
    from sparsmith.crafting.plan import Plan


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe:
    """The recipe of a YAML file, with local paths made absolute.

    Raises:
        RecipeErrors: every fault at once, each with `file:line: key`.
    """
    loaded = recipes.load_recipe(
        path, overrides, registry.config_classes(), check_paths=check_paths, tasks_of=_tasks_of
    )
    return recipes.with_absolute_paths(loaded, Path(path).absolute().parent)


def _tasks_of(method: str) -> tuple[str, ...]:
    """The tasks of a method; () for a name that is told as unknown elsewhere."""
    return registry.get(method).tasks if method in registry.names() else ()


def plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a recipe; reads the base's config alone."""
    from sparsmith.crafting.plan import plan_recipe

    return plan_recipe(load_recipe(path, overrides, check_paths=False))


def data_show(path: str | Path, overrides: Sequence[str] = (), *, rows: int = 3) -> Any:
    """The first rows of the training stream as the model will see them, and the counts per source."""
    from sparsmith.crafting.base_model import load_tokenizer
    from sparsmith.data import show

    recipe = load_recipe(path, overrides)
    return show(
        recipe.data, load_tokenizer(recipe.model), n=rows, seed=recipe.train.seed, classes=recipe.model.num_labels
    )
