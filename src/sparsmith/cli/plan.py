"""`sparsmith plan`."""

from __future__ import annotations

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile, read_recipe
from sparsmith.cli.screen import SCREEN


def plan(recipe: RecipeFile, overrides: Overrides = None, json: Json = False, debug: Debug = False) -> None:
    """Parameters total, active and trained, memory, FLOPs, disk; loads no weights."""
    settings, recipe_dir = read_recipe(recipe, overrides)
    from sparsmith import app

    SCREEN.show(app.plan(settings, recipe_dir))
