"""Every recipe in recipes/ opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsmith.methods import registry
from sparsmith.recipe import dump, load_recipe, load_text

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHARED = (ROOT / "../shared").resolve()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens(path):
    methods = registry.config_classes()
    recipe = load_recipe(path, (), methods, check_paths=False)
    assert load_text(dump(recipe), "dumped", (), methods, check_paths=False) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_it_reads_is_there(path):
    if "shared/" in path.read_text(encoding="utf-8") and not SHARED.is_dir():
        pytest.skip("the data and the base of this recipe are not part of the project")
    # a base that `tools/train_base.py` makes is not there before it was made
    own_base = () if "../build/" not in path.read_text(encoding="utf-8") else ("model.path=embedded",)
    load_recipe(path, own_base, registry.config_classes())
