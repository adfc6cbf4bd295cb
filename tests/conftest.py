"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_finish() -> None:
    """What the libraries have built by now stays until the end: a full collection, which every training ends with, need not walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base and its checkpoints of every form (`base`, `delta`, `full`, `export`); copy a folder before you change it."""
    from tests.kit.checkpoints import make_home

    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session", autouse=True)
def _strangers(tmp_path_factory) -> Iterator[None]:
    """Exports are proved by forks of one clean process; `real_strangers` brings the real ones back."""
    from tests.kit.strangers import serving

    with serving(tmp_path_factory.mktemp("strangers")):
        yield


@pytest.fixture
def real_strangers(monkeypatch) -> None:
    """A trial of the proof itself."""
    from sparsmith.exporting import prove
    from tests.kit.strangers import REAL

    monkeypatch.setattr(prove, "_stranger", REAL)
