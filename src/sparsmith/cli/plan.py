"""`sparsmith plan`."""

from __future__ import annotations

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile
from sparsmith.cli.screen import SCREEN


def plan(recipe: RecipeFile, overrides: Overrides = None, json: Json = False, debug: Debug = False) -> None:
    """Parameters total, active and trained, memory, FLOPs, disk; loads no weights."""
    from sparsmith import app

    SCREEN.show(app.plan(recipe, overrides or ()))
