"""`sparsmith protocol`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile
from sparsmith.cli.screen import SCREEN


def protocol(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The comparison: pesc.")],
    recipe: RecipeFile,
    overrides: Overrides = None,
    controls: Annotated[str, typer.Option(help="Names, comma-separated; absent = all.")] = "",
    seeds: Annotated[str, typer.Option(help="Whole numbers, comma-separated.")] = "0,1,2",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A paper's comparison as one command; finished runs are not repeated."""
    from sparsmith import app
    from sparsmith.errors import UsageError

    try:
        numbers = [int(seed) for seed in seeds.split(",") if seed.strip()]
    except ValueError:
        raise UsageError("--seeds", f"`{seeds}`", "whole numbers", "Write --seeds 0,1,2.") from None
    chosen = [name.strip() for name in controls.split(",") if name.strip()]
    SCREEN.show(app.protocol(name, recipe, overrides or (), controls=chosen, seeds=numbers))
