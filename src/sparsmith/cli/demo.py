"""`sparsmith demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, new_path
from sparsmith.cli.screen import SCREEN


def demo(
    out: Annotated[str, typer.Option(help="Folder for the runs and the report.")] = "runs/demo",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole story on the embedded base: offline, on CPU, minutes, ending in a report."""
    from sparsmith import app

    SCREEN.show(app.demo(new_path(out, "--out")), "report")
