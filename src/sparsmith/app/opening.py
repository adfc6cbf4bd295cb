"""The run's folder before a step is taken: is it free, is it ours, from which checkpoint does it go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsmith import durable, ranks
from sparsmith import recipe as recipes
from sparsmith.app.recipes import load_recipe
from sparsmith.errors import CheckpointError, RecipeError, RecipeErrors, SparsmithError, UsageError
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import StagedRecipe
from sparsmith.runs import RunFolder, StagesFolder, same_staged_root

# keys that change neither what is learned nor from what: a resumed run may take other values
FREE = frozenset(
    f"train.{key}" for key in ("save_every", "keep", "eval_every", "log_every", "report_to", "dry_step")
) | {"output"}


@contextmanager
def opened(run: RunFolder, recipe: Recipe, warn: Callable[[str], None]) -> Iterator[Path | None]:
    """Claim the folder for this process and yield the checkpoint to go on from, None at the start.

    Leftovers of a killed process are removed, figures of steps that are taken again are dropped, and a damaged checkpoint is passed over
    with a warning that names the file.

    Raises:
        UsageError: a folder of something else, a finished run, or a run that another process is tuning.
        RecipeErrors: a run of a recipe that differs in what matters; every differing key with both values.
    """
    if not ranks.is_first():
        ranks.wait()  # until the first has cleaned up
        yield _latest(run, lambda text: None)
        return
    run.root.mkdir(parents=True, exist_ok=True)
    with durable.claimed(run.root) as free:
        if not free:
            raise UsageError(
                str(run.root),
                "a run that another process is tuning",
                "a run that nobody tunes",
                "Wait for it, or end it.",
            )
        for place in (run.root, run.checkpoints, run.selection):
            durable.clean_leftovers(place)
        if any(run.root.iterdir()):
            _check_own(run, recipe)
        durable.write_text(run.recipe, recipes.dump(_movable(recipe, run)))
        found = _latest(run, warn)
        ranks.wait()
        yield found


def _movable(recipe: Recipe, run: RunFolder) -> Recipe:
    """What a stage's run writes down: the stage before is named relative to it, so that the whole can be moved."""
    base = recipe.model.path
    if not Path(base).is_absolute() or same_staged_root(base, run.root) is None:
        return recipe
    nearby = os.path.relpath(Path(base).resolve(), run.root.resolve())
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": nearby})})


def require_space(run: RunFolder, disk: dict[str, int], keep: int | None) -> None:
    """Refuse a run whose checkpoints cannot fit, before its first step.

    A new checkpoint is written before an old one goes, so `keep` + 1 lie there at once (one, without `save_every`), and then the model.

    Raises:
        EnvironmentFault: with the bytes needed and free.
    """
    from sparsmith.training.saves import listed

    places = max(1, (keep or 0) + 1 - len(listed(run.checkpoints)))
    durable.require_space(run.root, places * disk["trainer_checkpoint"] + disk["delta"])


def _check_own(run: RunFolder, recipe: Recipe) -> None:
    if not run.recipe.is_file():
        where = str(run.root)
        raise UsageError(where, "a folder with other files", "a new folder, or a run", "Change `output`.")
    if run.finished and run.report.is_file():
        raise UsageError(
            str(run.root), "a finished run", "an unfinished one to go on with", "Change `output`, or remove the folder."
        )
    refuse_other_recipe(run, recipe)


def refuse_other_recipe(
    run: RunFolder | StagesFolder, recipe: Recipe | StagedRecipe, free: Callable[[str], bool] = lambda key: key in FREE
) -> None:
    """Refuse a recipe that differs from the run's in what matters.

    Args:
        free: tells of a dotted key whether it may differ.

    Raises:
        RecipeErrors: every differing key with both values.
    """
    if run.recipe.read_text(encoding="utf-8") == recipes.dump(recipe):
        return
    try:
        known = load_recipe(run.recipe, check_paths=False)
    except SparsmithError as error:
        raise UsageError(
            str(run.recipe), f"a recipe that cannot be read ({error.found})", "the run's recipe", "Remove the folder."
        ) from error
    before, now = flat(known.model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key) and not free(key)]
    if changed:
        mend = "Set it back to go on with this run, or change `output` for a new one."
        raise RecipeErrors(
            [
                RecipeError(f"{run.recipe}: {key}", f"`{now.get(key)}`", f"`{before.get(key)}`, as the run began", mend)
                for key in changed
            ]
        )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{dotted key: plain value} of nested dicts and lists."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found.update(flat(item, f"{path}.{key}" if path else str(key)))
    return found


def _latest(run: RunFolder, warn: Callable[[str], None]) -> Path | None:
    from sparsmith.training.saves import latest

    faults: list[CheckpointError] = []
    found = latest(run.checkpoints, faults.append)
    going_on = f"going on from {found.name}" if found else "starting from the first step, as no whole one is left"
    for fault in faults:
        warn(f"warning: {fault.where}: found {fault.found}; {going_on}.")
    return found
