"""The recipe: typed settings of a run and their loader."""

from sparsmith.recipe.loader import dump, json_schema, load_recipe, load_text
from sparsmith.recipe.paths import EMBEDDED, is_hub_id, resolve, with_absolute_paths
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import Stage, StagedRecipe

__all__ = [
    "EMBEDDED",
    "Recipe",
    "Stage",
    "StagedRecipe",
    "dump",
    "is_hub_id",
    "json_schema",
    "load_recipe",
    "load_text",
    "resolve",
    "with_absolute_paths",
]
