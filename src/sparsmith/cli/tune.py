"""`sparsmith tune`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile, read_recipe
from sparsmith.cli.screen import SCREEN


class OnExisting(StrEnum):
    """What to do where the output folder holds a run already."""

    RESUME = "resume"
    STOP = "stop"
    REPLACE = "replace"


def tune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on_existing: Annotated[
        OnExisting, typer.Option(help="Where the output folder holds a run already.")
    ] = OnExisting.RESUME,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Craft and tune as the recipe says; writes a run, and resumes one that was cut."""
    settings, recipe_dir = read_recipe(recipe, overrides)
    from sparsmith import app

    SCREEN.show(app.tune(settings, recipe_dir, on_existing=on_existing.value), "run")
