"""`sparsmith demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, new_path
from sparsmith.cli.screen import SCREEN


def demo(
    out: Annotated[
        str, typer.Option(help="A new folder for the rows, the runs, the export and the report.")
    ] = "sparsmith-demo",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole story on the embedded base: offline, on CPU, minutes, ending in a report."""
    from sparsmith import app

    figures = app.demo(new_path(out, "--out"))
    if SCREEN.json:
        SCREEN.show(figures)
