"""The scripts in `tools/` import each other by bare name, as a script does; here their folder is put on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.unit.tools.texts import documents, held_out

TOOLS = str(Path(__file__).resolve().parents[3] / "tools")
if TOOLS not in sys.path:
    sys.path.append(TOOLS)


@pytest.fixture
def no_files(monkeypatch):
    """The verbs without the training files: made-up texts, nothing of them thrown out as seen."""
    import base_data

    monkeypatch.setattr(base_data, "load", lambda folder: (documents(0), held_out()))
    monkeypatch.setattr(base_data, "unseen", lambda train, texts: texts)
