"""Arguments and flags that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsmith.cli.screen import SCREEN
from sparsmith.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of a fault.")]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the recipe's: train.steps=50.")
]
Target = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model: folder, hub id, `embedded`.")
]


def folder(text: str, flag: str) -> Path:
    """A folder that must be there."""
    path = Path(text)
    try:
        found = bool(text) and path.is_dir()
    except (OSError, ValueError):
        found = False
    if not found:
        raise UsageError(flag, f"`{text}`, which is no folder", "a folder that exists", "Check the path.")
    return path


def new_path(text: str, flag: str) -> Path:
    """A path to write to: not a file that is there."""
    path = Path(text)
    try:
        taken = path.is_file()
    except (OSError, ValueError):
        taken = True
    if taken or not text:
        raise UsageError(flag, f"`{text}`", "a path that can be made", "Choose another path.")
    return path


def group(about: str) -> typer.Typer:
    """A verb that has verbs; alone it prints its help."""
    app = typer.Typer(help=about, rich_markup_mode=None, add_completion=False)

    @app.callback(invoke_without_command=True)
    def _help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            SCREEN.show(context.get_help(), "help")

    return app
