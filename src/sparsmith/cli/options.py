"""Arguments and flags that several verbs share, and the reading of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsmith.errors import UsageError

if TYPE_CHECKING:
    from sparsmith.recipe.schema import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of a fault.")]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the recipe's: train.steps=50.")
]
Target = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model: folder, hub id, `embedded`.")
]


def read_recipe(path: str, overrides: list[str] | None) -> tuple[Recipe, Path]:
    """The validated recipe and the folder that its paths are relative to."""
    from sparsmith.methods import registry
    from sparsmith.recipe import load_recipe

    return load_recipe(path, overrides or (), registry.config_classes()), Path(path).parent.resolve()


def folder(text: str, flag: str) -> Path:
    """A folder that must be there."""
    path = Path(text)
    try:
        found = path.is_dir()
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
