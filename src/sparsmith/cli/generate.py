"""`sparsmith generate`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sparsmith.cli.modes import one_mode
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
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks to run.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="0.6|12ms", help="Deepest depth within a share of the compute, or a time.")
    ] = None,
    exit_threshold: Annotated[
        str | None,
        typer.Option(metavar="X|N:X,..|FILE|calibrated", help="Take a token at the first depth that is this sure."),
    ] = None,
    visit: Annotated[
        str | None, typer.Option(metavar="N,N", help="Of --exit-threshold: the depths that are looked at.")
    ] = None,
    self_speculative: Annotated[
        str | None, typer.Option(metavar="N[:K]", help="Draft K tokens at depth N, verify with all blocks; lossless.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of --budget in ms; absent = the run's, from `sparsmith bench`.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="After the text, what it took.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Text for a prompt, streamed; of a depth-elastic model at one depth, within a budget, with early exits, or drafting for itself."""
    if prompt is None and sys.stdin.isatty():
        raise UsageError("--prompt", "nothing", "a prompt, or text on stdin", "Add --prompt TEXT.")
    if temperature == 0 and top_p < 1:
        raise UsageError(
            "--top-p", f"`{top_p}`, which has no effect here", "--temperature above 0", "Set --temperature."
        )
    mode = one_mode(depth, budget, exit_threshold, self_speculative, visit=visit, profile=profile)
    text = sys.stdin.read().rstrip("\n") if prompt is None else prompt
    from sparsmith import app

    pieces: list[str] = []
    took: list[Any] = []
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "raw": raw}
    for piece in app.generate(target, text, **settings, **mode, on_done=took.append):
        SCREEN.stream(piece)
        pieces.append(piece)
    SCREEN.stream("\n")
    if stats:
        SCREEN.stream(f"\n{took[0]}\n")
    if SCREEN.json:
        SCREEN.show({"prompt": text, "text": "".join(pieces), **({"stats": took[0].as_dict()} if stats else {})})
