"""`sparsmith generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Target
from sparsmith.cli.screen import SCREEN
from sparsmith.errors import UsageError


def generate(
    target: Target,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The instruction; absent = read from stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of probability that is drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 42,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the run's template.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Text for a prompt, streamed."""
    if prompt is None and sys.stdin.isatty():
        raise UsageError("--prompt", "nothing", "a prompt, or text on stdin", "Add --prompt TEXT.")
    if temperature == 0 and top_p < 1:
        raise UsageError(
            "--top-p", f"`{top_p}`, which has no effect here", "--temperature above 0", "Set --temperature."
        )
    text = sys.stdin.read().rstrip("\n") if prompt is None else prompt
    from sparsmith import app

    pieces = []
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "raw": raw}
    for piece in app.generate(target, text, **settings):
        SCREEN.stream(piece)
        pieces.append(piece)
    SCREEN.stream("\n")
    if SCREEN.json:
        SCREEN.show({"prompt": text, "text": "".join(pieces)})
