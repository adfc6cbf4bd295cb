"""`sparsmith bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, Target
from sparsmith.cli.screen import SCREEN
from sparsmith.errors import UsageError


def bench(
    target: Target,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose data.eval is used; a run has its own.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the files; absent = the run's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that run together, beside one alone.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompts.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written behind each prompt.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured, in turn.")] = 5,
    prompts: Annotated[
        int, typer.Option(min=1, help="Held-out prompts for thresholds, the first few for ways of writing.")
    ] = 64,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows of each set for the losses.")] = 100,
    calibrate: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Write exit thresholds for this agreement, such as 0.98.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the prompts.")] = 42,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Speed, memory and loss by depth and way of writing, beside the base; saves the profile and thresholds that generate reads."""
    if overrides and recipe is None:
        raise UsageError("KEY=VALUE", f"`{overrides[0]}`", "--recipe, which it changes", "Add --recipe RECIPE.")
    if calibrate is not None and not 0 < calibrate < 1:
        raise UsageError("--calibrate", f"`{calibrate}`", "an agreement between 0 and 1", "Write --calibrate 0.98.")
    from sparsmith import app

    settings = {"batch": batch, "context": context, "new_tokens": new_tokens, "repeats": repeats}
    asked = {"prompts": prompts, "rows": rows, "calibrate": calibrate, "seed": seed}
    SCREEN.show(app.bench(target, recipe, overrides or (), out=out, **settings, **asked))
