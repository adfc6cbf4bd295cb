"""`sparsmith eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, Target
from sparsmith.cli.screen import SCREEN
from sparsmith.errors import UsageError


def evaluate(
    target: Target,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose data.eval is used; a run has its own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 42,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Held-out loss, rank classification and exact match, with 95 % intervals."""
    if overrides and recipe is None:
        raise UsageError("KEY=VALUE", f"`{overrides[0]}`", "--recipe, which it changes", "Add --recipe RECIPE.")
    from sparsmith import app

    SCREEN.show(app.evaluate_apart(target, recipe, overrides or (), seed=seed))
