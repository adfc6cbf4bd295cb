"""`sparsmith protocol`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsmith.cli.options import Debug, Json, Overrides, RecipeFile
from sparsmith.cli.screen import SCREEN

Names = str | None


def protocol(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The comparison: flan-moe, finegates, pesc or soft.")],
    recipe: RecipeFile,
    overrides: Overrides = None,
    seeds: Annotated[Names, typer.Option(help="Whole numbers, comma-separated; absent = 0,1,2.")] = None,
    controls: Annotated[Names, typer.Option(help="pesc: names, comma-separated; absent = all.")] = None,
    arms: Annotated[
        Names,
        typer.Option(
            help="soft: of sft,ict,extracted,soft; finegates: of finegates,importance,flap_like,magnitude,random,lora; absent = all."
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SETTINGS", help="soft, finegates: one more arm, NAME=key=value,key=value."),
    ] = None,
    ict_share: Annotated[float | None, typer.Option(help="soft: steps of ICT over those of SFT.")] = None,
    extracted_steps: Annotated[Names, typer.Option(help="soft: equal (to SoFT's steps) or compute.")] = None,
    verdicts: Annotated[Names, typer.Option(help="soft: JSONL with a judge's verdicts.")] = None,
    targets: Annotated[Names, typer.Option(help="finegates: shares that remain; absent = 0.9,0.8,0.7,0.6,0.5.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A paper's comparison as one command; finished runs are not repeated."""
    from sparsmith import app

    result = app.protocol(
        name,
        recipe,
        overrides or (),
        seeds=_numbers(seeds),
        controls=_words(controls),
        arms=_words(arms),
        named=arm or None,
        ict_share=ict_share,
        extracted_steps=extracted_steps,
        verdicts=verdicts,
        targets=_shares(targets),
    )
    SCREEN.show(result)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str | None) -> list[int] | None:
    from sparsmith.errors import UsageError

    try:
        return None if text is None else [int(word) for word in _words(text) or ()]
    except ValueError:
        raise UsageError("--seeds", f"`{text}`", "whole numbers", "Write --seeds 0,1,2.") from None


def _shares(text: str | None) -> list[float] | None:
    from sparsmith.errors import UsageError

    try:
        return None if text is None else [float(word) for word in _words(text) or ()]
    except ValueError:
        raise UsageError("--targets", f"`{text}`", "numbers", "Write --targets 0.8,0.6.") from None
