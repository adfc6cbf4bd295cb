"""`sparsmith demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, new_path
from sparsmith.cli.screen import SCREEN


def demo(
    out: Annotated[
        str | None, typer.Option(help="A new folder; absent = the first free one of runs/demo, runs/demo-2, ...")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole story on the embedded base: offline, on CPU, minutes, ending in a report."""
    from sparsmith import app

    SCREEN.show(app.demo(new_path(out, "--out") if out else None))
