"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base and its checkpoints of every form (`base`, `delta`, `full`, `export`); copy a folder before you change it."""
    from tests.kit.checkpoints import make_home

    return make_home(tmp_path_factory.mktemp("home"))
