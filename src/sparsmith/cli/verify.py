"""`sparsmith verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, folder
from sparsmith.cli.screen import SCREEN


def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, an export or a run.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Every hash, shape and number of a checkpoint."""
    path = folder(directory, "DIR")
    from sparsmith import app

    SCREEN.show(app.verify(path))
