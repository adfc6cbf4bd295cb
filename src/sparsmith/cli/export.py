"""`sparsmith export`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from sparsmith.cli.options import Debug, Json, folder, new_path
from sparsmith.cli.screen import SCREEN


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
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new folder.")],
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
    proof: Annotated[bool, typer.Option(help="Open the folder in a clean process and compare logits.")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A folder that others open; proves itself by reloading in a clean process."""
    source, target = folder(run, "RUN"), new_path(out, "OUT")
    from sparsmith import app

    cut: dict[str, Any] = {"depths": "all"} if every else {}
    cut |= {} if depth is None else {"depth": depth}
    chosen = dtype.value if dtype else None
    options: dict[str, Any] = {"form": form.value, "deci": deci, "measure": measure, **cut}
    SCREEN.show(app.export(source, target, dtype=chosen, fold_scale=fold_scale, proof=proof, **options), "export")
