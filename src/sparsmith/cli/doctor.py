"""`sparsmith doctor`."""

from __future__ import annotations

from sparsmith.cli.options import Debug, Json
from sparsmith.cli.screen import SCREEN


def doctor(json: Json = False, debug: Debug = False) -> None:
    """The machine, what is free on it, and what is missing."""
    from sparsmith import app

    SCREEN.show(app.doctor())
