"""`sparsmith eval`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from sparsmith.cli.options import Debug, Json, Overrides, Target, folder
from sparsmith.cli.screen import SCREEN
from sparsmith.errors import UsageError


class Scorer(StrEnum):
    harness = "harness"
    rank = "rank"


def evaluate(
    target: Target,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose data.eval is used; a run has its own.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the bootstrap; with --tasks, of the draw of the shots.")
    ] = 42,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead: names, task files, folders; a,b,c.")
    ] = None,
    tasks_data: Annotated[
        str | None, typer.Option(metavar="DIR", help="With --tasks: the folder of their files.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: at most this many rows of each.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: examples before each question; else each task's own.")
    ] = None,
    scorer: Annotated[
        Scorer | None, typer.Option(help="With --tasks: who scores options, the harness or our faster rank classifier.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Held-out loss, rank classification and exact match, with 95 % intervals; or benchmarks (--tasks) with standard errors."""
    if overrides and recipe is None:
        raise UsageError("KEY=VALUE", f"`{overrides[0]}`", "--recipe, which it changes", "Add --recipe RECIPE.")
    given = {"--tasks-data": tasks_data, "--limit": limit, "--shots": shots, "--scorer": scorer}
    idle = next((flag for flag, value in given.items() if value is not None), None)
    if tasks is None and idle is not None:
        raise UsageError(idle, f"`{given[idle]}`", "--tasks, which it belongs to", "Add --tasks NAMES.")
    if tasks is not None and recipe is not None:
        raise UsageError(
            "--recipe", f"`{recipe}`", "no recipe beside --tasks, which brings its own rows", "Leave one of them out."
        )
    from sparsmith import app

    if tasks is None:
        SCREEN.show(app.evaluate_apart(target, recipe, overrides or (), seed=seed))
        return
    options: dict[str, Any] = {"data": folder(tasks_data, "--tasks-data") if tasks_data is not None else None}
    options |= {"limit": limit, "shots": shots, "seed": seed, "scorer": (scorer or Scorer.harness).value}
    SCREEN.show(app.evaluate_tasks(target, [name.strip() for name in tasks.split(",") if name.strip()], **options))
