"""`sparsmith data show`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile, group
from sparsmith.cli.screen import SCREEN

app = group("What trains and what is evaluated.")


@app.command("show")
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to show.")] = 3,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Rows as the model sees them: tokens, and which of them are trained on."""
    from sparsmith import app as functions

    SCREEN.show(functions.data_show(recipe, overrides or (), rows=rows), "rows")
