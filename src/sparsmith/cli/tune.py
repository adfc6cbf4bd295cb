"""`sparsmith tune`."""

from __future__ import annotations

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile
from sparsmith.cli.screen import SCREEN


def tune(recipe: RecipeFile, overrides: Overrides = None, json: Json = False, debug: Debug = False) -> None:
    """Craft and tune as the recipe says; writes a run, and resumes one that was cut."""
    from sparsmith import app

    SCREEN.show(app.tune(recipe, overrides or ()), "run")
