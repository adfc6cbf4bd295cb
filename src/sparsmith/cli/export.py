"""`sparsmith export`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, folder, new_path
from sparsmith.cli.screen import SCREEN


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new folder.")],
    proof: Annotated[bool, typer.Option(help="Open the folder in a clean process and compare logits.")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A folder that others open; proves itself by reloading in a clean process."""
    source, target = folder(run, "RUN"), new_path(out, "OUT")
    from sparsmith import app

    SCREEN.show(app.export(source, target, proof=proof), "export")
