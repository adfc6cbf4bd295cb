"""`sparsmith data show` and `sparsmith data overlap`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile, group, new_path
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


@app.command("overlap")
def overlap(
    recipe: RecipeFile,
    overrides: Overrides = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", help="A whole mixture that was trained on besides, by the base say: flan2022, p3, niv2, ..."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for overlap.json; in a run's folder `sparsmith eval` reads it.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Where evaluation sets and training rows meet: by family, by exact text, by runs of 13 words."""
    from sparsmith import app as functions

    folder = None if out is None else new_path(out, "--out")
    SCREEN.show(functions.data_overlap(recipe, overrides or (), presets=preset or (), out=folder), "overlap")
