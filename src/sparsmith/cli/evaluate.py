"""`sparsmith eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, Target, new_path, read_recipe
from sparsmith.cli.screen import SCREEN
from sparsmith.errors import UsageError


def evaluate(
    target: Target,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose data.eval is used; a run has its own.")] = None,
    out: Annotated[str | None, typer.Option(help="Write the figures here as JSON.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Held-out loss, rank classification and exact match, with 95 % intervals."""
    if overrides and recipe is None:
        raise UsageError("[KEY=VALUE]", f"`{overrides[0]}`", "--recipe, which it changes", "Add --recipe RECIPE.")
    settings, recipe_dir = read_recipe(recipe, overrides) if recipe else (None, None)
    file = new_path(out, "--out") if out else None
    from sparsmith import app

    SCREEN.show(app.evaluate(target, settings, recipe_dir, out=file))
