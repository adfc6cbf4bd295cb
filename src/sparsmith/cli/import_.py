"""`sparsmith import camelidae`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, folder, group, new_path
from sparsmith.cli.screen import SCREEN

app = group("Published checkpoints become ours.")


@app.command("camelidae")
def camelidae(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The published checkpoint.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new folder.")],
    adapter_dim: Annotated[
        int | None, typer.Option(min=1, help="Width of an adapter, where the config lacks it.")
    ] = None,
    adapter_scale: Annotated[
        float | None, typer.Option(help="Scale of the adapters, where the config lacks it.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts per token, where the config lacks it.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Rotary base, for bases known to differ from 10000.")] = None,
    base: Annotated[str | None, typer.Option(help="The dense base, where DIR holds the experts alone.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A published PESC checkpoint (Camelidae layout) becomes ours."""
    source, target = folder(directory, "DIR"), new_path(out, "OUT")
    figures = {"adapter_dim": adapter_dim, "adapter_scale": adapter_scale, "top_k": top_k, "rope_theta": rope_theta}
    from sparsmith import app as functions

    SCREEN.show(functions.import_camelidae(source, target, base=base, **figures), "checkpoint")
