"""`sparsmith report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, folder, new_path
from sparsmith.cli.screen import SCREEN


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One or more runs, side by side.")],
    out: Annotated[str | None, typer.Option(help="The page; absent = report.html in the first run.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page with plots."""
    folders = [folder(run, "RUN") for run in runs]
    page = new_path(out, "--out") if out and not Path(out).is_file() else Path(out or folders[0] / "report.html")
    from sparsmith import app

    SCREEN.show(app.report(folders, page), "report")
