"""What needs a recipe and no weights: load, plan, show the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import recipe as recipes
from sparsmith.errors import UsageError
from sparsmith.methods import registry
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import StagedRecipe

if TYPE_CHECKING:
    from sparsmith.crafting.plan import Plan
    from sparsmith.crafting.plan_stages import StagesPlan


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe | StagedRecipe:
    """The recipe of a YAML file, with local paths made absolute; a `StagedRecipe` of one that holds `stages`.

    Raises:
        RecipeErrors: every fault at once, each with `file:line: key`.
    """
    loaded = recipes.load_recipe(
        path, overrides, registry.config_classes(), check_paths=check_paths, tasks_of=_tasks_of
    )
    return recipes.with_absolute_paths(loaded, Path(path).absolute().parent)


def _tasks_of(method: str) -> tuple[str, ...]:
    """The tasks of a method; () for a name that is told as unknown elsewhere."""
    return registry.tasks_of(method) if method in registry.names() else ()


def single_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True, what: str = ""
) -> Recipe:
    """The recipe of a file that holds one crafting.

    Raises:
        UsageError: it holds `stages`; `what` says who cannot use them.
    """
    loaded = load_recipe(path, overrides, check_paths=check_paths)
    if isinstance(loaded, StagedRecipe):
        names = ", ".join(stage.name for stage in loaded.stages)
        raise UsageError(
            f"{path}: stages",
            f"{len(loaded.stages)} stages ({names})",
            f"a recipe with `methods`: {what or 'this asks for one crafting'}",
            "Write the stage that is meant as a recipe of its own.",
        )
    return loaded


def measured_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe:
    """The recipe whose rows measure a model: of several stages the last."""
    loaded = load_recipe(path, overrides, check_paths=check_paths)
    return loaded.recipe(-1) if isinstance(loaded, StagedRecipe) else loaded


def plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan | StagesPlan:
    """The plan of a recipe, of every stage where there are several; reads the base's config alone."""
    from sparsmith.crafting.plan import plan_recipe
    from sparsmith.crafting.plan_stages import plan_stages

    recipe = load_recipe(path, overrides, check_paths=False)
    return plan_stages(recipe) if isinstance(recipe, StagedRecipe) else plan_recipe(recipe)


def data_show(path: str | Path, overrides: Sequence[str] = (), *, rows: int = 3) -> Any:
    """The first rows of the training stream as the model will see them, and the counts per source; of every stage."""
    from sparsmith.app.each_stage import EachStage

    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, StagedRecipe):
        return _shown(recipe, rows)
    names = [f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, 1)]
    return EachStage(tuple((name, _shown(recipe.recipe(index), rows)) for index, name in enumerate(names)))


def _shown(recipe: Recipe, rows: int) -> Any:
    from sparsmith.crafting.base_model import load_tokenizer
    from sparsmith.data import show

    return show(
        recipe.data,
        load_tokenizer(recipe.model),
        n=rows,
        seed=recipe.train.seed,
        classes=recipe.model.num_labels,
        pairs=recipe.model.task == "seq2seq",
    )
