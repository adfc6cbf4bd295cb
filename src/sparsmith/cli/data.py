"""`sparsmith data show`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile, read_recipe
from sparsmith.cli.screen import SCREEN

app = typer.Typer(help="What trains and what is evaluated.", rich_markup_mode=None, add_completion=False)


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        SCREEN.show(context.get_help(), "help")


@app.command("show")
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows of each source.")] = 2,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Rows as the model sees them: tokens, and which of them are trained on."""
    settings, recipe_dir = read_recipe(recipe, overrides)
    from sparsmith import app as functions

    SCREEN.show(functions.data_show(settings, recipe_dir, rows))
