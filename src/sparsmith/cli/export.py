"""`sparsmith export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsmith.cli.options import Debug, Json, Overrides, folder, new_path
from sparsmith.cli.screen import SCREEN
from sparsmith.errors import UsageError


class Dtype(StrEnum):
    """Number types that a folder may be written in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Form(StrEnum):
    """Forms of a model from which parts were deleted."""

    AUTO = "auto"
    UNIFORM = "uniform"
    PER_LAYER = "per-layer"
    ZEROS = "zeros"
    PADDED = "padded"


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|RECIPE",
            help="A run's folder, a checkpoint, or the file of a recipe whose method is `upcycle`: its mixture, not tuned yet.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new folder.")],
    overrides: Overrides = None,
    depth: Annotated[int | None, typer.Option(help="Of a depth-elastic model: cut out this exit.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every depth, each in a folder depth-N of OUT.")] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number type of the base's weights; absent = as they are.")
    ] = None,
    fold_scale: Annotated[
        bool, typer.Option("--fold-scale", help="Multiply constant scales into the weights.")
    ] = False,
    form: Annotated[
        Form, typer.Option(help="Of a pruned model: what is left (auto = the smallest, stock where possible).")
    ] = Form.AUTO,
    deci: Annotated[
        bool, typer.Option("--deci", help="Write deci_config.json too: per-layer Llama, FFNs only.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time a pruned model beside the dense one.")] = False,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="Of a recipe: bytes of a weight file, such as 5GB (default).")
    ] = None,
    proof: Annotated[bool, typer.Option(help="Open the folder in a clean process and compare logits.")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A folder that others open; proves itself by reloading in a clean process."""
    is_recipe = _is_file(run)
    source, target = Path(run) if is_recipe else folder(run, "RUN|RECIPE"), new_path(out, "OUT")
    of_runs = {"--depth": depth is not None, "--all": every, "--fold-scale": fold_scale, "--deci": deci}
    of_runs |= {"--measure": measure, "--form": form is not Form.AUTO}
    _refuse_idle(of_runs if is_recipe else {"--max-shard-size": max_shard_size is not None}, is_recipe)
    if overrides and not is_recipe:
        raise UsageError(overrides[0], "a setting beside a run's folder", "RUN and OUT", "Settings go with a recipe.")
    from sparsmith import app

    chosen = dtype.value if dtype else None
    if is_recipe:
        given: dict[str, Any] = {"dtype": chosen, "proof": proof, "max_shard_size": max_shard_size}
        told = app.convert(source, target, overrides or (), on_plan=lambda sizes: SCREEN.stream(f"{sizes}\n"), **given)
        SCREEN.show(told, "export")
        return
    cut: dict[str, Any] = {"depths": "all"} if every else {}
    cut |= {} if depth is None else {"depth": depth}
    options: dict[str, Any] = {"form": form.value, "deci": deci, "measure": measure, **cut}
    SCREEN.show(app.export(source, target, dtype=chosen, fold_scale=fold_scale, proof=proof, **options), "export")


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_file()
    except (OSError, ValueError):
        return False


def _refuse_idle(given: dict[str, bool], is_recipe: bool) -> None:
    """Flags that have no effect on what is exported."""
    what, expected = ("a recipe's file", "a run's folder") if is_recipe else ("a run's folder", "a recipe's file")
    for flag, on in given.items():
        if on:
            raise UsageError(flag, f"the flag beside {what}", f"it beside {expected}", f"Leave `{flag}` out.")
