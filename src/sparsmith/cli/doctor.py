"""`sparsmith doctor`."""

from __future__ import annotations

from sparsmith.cli.options import Debug, Json
from sparsmith.cli.screen import SCREEN


def doctor(json: Json = False, debug: Debug = False) -> None:
    """The machine and the versions that matter."""
    from sparsmith import app

    SCREEN.show(app.doctor())
