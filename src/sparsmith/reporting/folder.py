"""A run's folder as data. What a run must have written is required; the rest may be absent and is then None."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsmith.bootstrap import RowScores
from sparsmith.errors import CheckpointError
from sparsmith.runs import RunFolder

Points = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """Everything that the report shows of one run."""

    name: str
    recipe_text: str
    recipe: dict[str, Any]
    facts: dict[str, Any]
    steps: Points
    """Log steps of `metrics.jsonl`."""
    evals: Points
    """Evaluation points of `metrics.jsonl`."""
    plan: dict[str, Any] | None
    data: dict[str, Any] | None
    tables: dict[str, dict[str, Any]] | None
    evaluation: dict[str, Any] | None
    samples: list[dict[str, str]] | None
    proof: dict[str, Any] | None
    guard: dict[str, Any] | None = None
    """The full model held against its control."""
    bench: dict[str, Any] | None = None
    accounting: dict[str, Any] | None = None
    """What a pruned model lost, method by method, in three ways of counting; there once the run has been exported."""
    exits: dict[str, Any] | None = None
    control_depths: dict[str, Any] | None = None
    """The control's results by depth, where it was tuned beside this run."""

    @property
    def depths(self) -> dict[str, Any]:
        """Depth -> result of the tuned model; {} for a model of one depth."""
        return (self.evaluation or {}).get("depths") or {}

    @property
    def methods(self) -> list[dict[str, Any]]:
        """The recipe's method entries."""
        return list(self.recipe.get("methods") or [])

    @property
    def is_control(self) -> bool:
        """Whether the run was made to be compared with (a method's `control`)."""
        return any(compared_as(method) for method in self.methods)

    def rows(self, system: str) -> dict[str, dict[str, RowScores]]:
        """Scores row by row of `base` or `tuned`."""
        raw = ((self.evaluation or {}).get(system) or {}).get("rows", {})
        return {name: {m: RowScores.of(scores) for m, scores in metrics.items()} for name, metrics in raw.items()}


def compared_as(method: dict[str, Any]) -> str:
    """What a method's entry is in a comparison: the name of a rival or a control; "" for the method itself.

    An entry says it by `arm`, which is the method's own name for the method itself, or else by `control`.
    """
    if "arm" in method:
        return "" if method["arm"] == method.get("method") else str(method["arm"])
    named = str(method.get("control", "none"))
    return "" if named == "none" else named


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs, the one that the report is about first: the first that is no control, else the first.

    Raises:
        CheckpointError: a folder without the files that every finished run has, or with a file that cannot be read.
    """
    if not folders:
        raise CheckpointError("report", "no run", "at least one run folder", "Name the folders to report on.")
    runs = [_read(Path(folder), name) for folder, name in zip(folders, _names([Path(folder) for folder in folders]))]
    main = next((run for run in runs if not run.is_control), runs[0])
    return [main, *(run for run in runs if run is not main)]


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path that tells them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} ({number})" for number, part in enumerate(parts, 1)]


def _read(root: Path, name: str) -> Run:
    folder = RunFolder(root)
    for path, what in ((folder.recipe, "recipe"), (folder.facts, "facts"), (folder.metrics, "figures of its steps")):
        if not path.is_file():
            raise CheckpointError(
                str(path),
                "no such file",
                f"the run's {what}",
                "Give the folder of a finished run (`sparsmith tune` ends it).",
            )
    recipe_text = folder.recipe.read_text(encoding="utf-8")
    points = points_of(folder.metrics)
    return Run(
        name=name,
        recipe_text=recipe_text,
        recipe=_recipe(folder.recipe, recipe_text),
        facts=_table(folder, folder.facts) or {},
        steps=[point for point in points if "loss" in point],
        evals=[point for point in points if "eval_loss" in point or "eval_domain_loss" in point],
        plan=_table(folder, folder.plan),
        data=_table(folder, folder.data),
        tables=_table(folder, folder.tables),
        evaluation=_table(folder, folder.evaluation),
        samples=folder.read(folder.samples),
        proof=_table(folder, folder.proof),
        guard=_table(folder, folder.guard),
        bench=_table(folder, folder.bench),
        exits=_table(folder, folder.exits),
        accounting=_table(folder, folder.accounting),
        control_depths=(_table(folder.control, folder.control.evaluation) or {}).get("depths"),
    )


def _table(folder: RunFolder, path: Path) -> dict[str, Any] | None:
    value = folder.read(path)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(str(path), type(value).__name__, "a JSON object", "Run `sparsmith tune` again.")
    return value


def _recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as fault:
        raise CheckpointError(str(path), " ".join(str(fault).split()), "YAML", "Restore the run's recipe.") from fault
    if not isinstance(recipe, dict):
        raise CheckpointError(str(path), type(recipe).__name__, "a mapping", "Restore the run's recipe.")
    return recipe


def points_of(path: Path) -> Points:
    """The points in the order of their steps; of a step written twice (a resumed run) the later one counts."""
    points: dict[tuple[int, bool], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            point = json.loads(line)
            points[int(point["step"]), "loss" in point] = point
        except (ValueError, KeyError, TypeError) as fault:
            raise CheckpointError(
                f"{path}:{number}", f"{type(fault).__name__}", "a JSON object with `step`", "Remove the line."
            ) from fault
    return [points[key] for key in sorted(points)]
