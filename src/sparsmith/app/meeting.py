"""What trains and what is evaluated, held against each other: of a recipe, and of a run that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.app.recipes import load_recipe, measured_recipe
from sparsmith.errors import UsageError
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import StagedRecipe
from sparsmith.runs import RunFolder, StagesFolder, is_run, is_staged, open_run, staged_root

if TYPE_CHECKING:
    from sparsmith.data.overlap_report import OverlapReport
    from sparsmith.data.overlap_search import Trained


def data_overlap(
    path: str | Path, overrides: Sequence[str] = (), *, presets: Sequence[str] = (), out: str | Path | None = None
) -> OverlapReport:
    """Where the rows of a recipe's evaluation sets meet those that it trains on; of several stages the training rows of all against the
    evaluation sets of the last.

    Args:
        presets: whole mixtures trained on besides (by the base, say): `flan2022`, ...
        out: a folder to write `overlap.json` into; in a run's own folder `evaluate` reads it.

    Raises:
        UsageError: no evaluation sets, or an unknown preset.
    """
    from sparsmith.data import find_overlap

    recipe = load_recipe(path, overrides)
    last = recipe.recipe(-1) if isinstance(recipe, StagedRecipe) else recipe
    if not last.data.eval:
        raise UsageError(f"{path}: data.eval", "no evaluation sets", "at least one", "Name one under `data.eval`.")
    report = find_overlap(
        _trained(recipe),
        last.data.eval,
        on_bad_row=last.data.on_bad_row,
        classes=last.model.num_labels,
        presets=presets,
    )
    if out is not None:
        report.write(out)
    return report


def evaluate_apart(
    target: str | Path, recipe: str | Path | None = None, overrides: Sequence[str] = (), *, seed: int = 42
) -> Any:
    """`evaluate`, with the averages over clean and over seen sets apart where it is known what the model was trained on: a run.

    Returns:
        An `ApartResult` of a run; of any other model what `evaluate` returns.
    """
    from sparsmith.app.use import evaluate
    from sparsmith.evaluating.apart import ApartResult

    result = evaluate(target, recipe, overrides, seed=seed)
    if not is_run(target) and not is_staged(target):
        return result
    run = open_run(target)
    whole = _whole_of(run)
    chosen = (
        measured_recipe(recipe, overrides) if recipe is not None else measured_recipe(run.recipe, check_paths=False)
    )
    return ApartResult(result, overlap_of_run(run, _trained(whole, _number_of(run)), chosen))


def overlap_of_run(run: RunFolder, trained: Sequence[Trained], measured: Recipe) -> OverlapReport:
    """The run's own `overlap.json` where it is of these sets and files; else what tags tell."""
    from sparsmith.data.overlap_report import OverlapReport
    from sparsmith.data.overlap_search import fingerprint_of, tag_overlap

    stored = OverlapReport.read(run.overlap) if run.overlap.is_file() else None
    if stored is None:
        return tag_overlap(trained, measured.data.eval)
    files = (run.read(run.data) or {}).get("fingerprints", {})
    changed = [name for name, digest in stored.files.items() if files.get(name, digest) != digest]
    if stored.fingerprint == fingerprint_of(trained, measured.data.eval, stored.presets) and not changed:
        return stored
    tags = tag_overlap(trained, measured.data.eval, stored.presets)
    why = f"{run.overlap.name} is of other " + (f"bytes of {changed[0]}" if changed else "sources")
    return replace(tags, basis=f"{tags.basis}; {why} and was not used")


def _trained(recipe: Recipe | StagedRecipe, stages: int | None = None) -> list[Trained]:
    """All that the recipe trains on, of several stages the first `stages`."""
    from sparsmith.data.overlap_search import trained_by

    if not isinstance(recipe, StagedRecipe):
        return trained_by(recipe.data, recipe.train.seed)
    return [one for stage in recipe.stages[:stages] for one in trained_by(stage.data, stage.train.seed)]


def _whole_of(run: RunFolder) -> Recipe | StagedRecipe:
    """The recipe that the run's model comes from, with the stages before its own."""
    root = staged_root(run.root)
    return load_recipe(StagesFolder(root).recipe if root is not None else run.recipe, check_paths=False)


def _number_of(run: RunFolder) -> int | None:
    """Which stage the run is, from 1; None where it is none."""
    root = staged_root(run.root)
    if root is None:
        return None
    stages = [stage.root.resolve() for stage in StagesFolder(root).stages()]
    return stages.index(run.root.resolve()) + 1 if run.root.resolve() in stages else None
