"""A YAML file and `key=value` overrides -> a `Recipe`, or all faults at once. Nothing else is read, loaded or written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import core_schema

from sparsmith.errors import RecipeError, RecipeErrors, SparsmithError
from sparsmith.recipe.checks import Splits, check
from sparsmith.recipe.faults import report
from sparsmith.recipe.overrides import apply_overrides
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.stage_trees import load_stages
from sparsmith.recipe.staged import Outline, StagedRecipe, StageOutline
from sparsmith.recipe.strict import StrictModel
from sparsmith.recipe.task_checks import TasksOf, check_task
from sparsmith.recipe.yaml_tree import Tree, decode, dump_yaml, parse

MethodConfigs = Mapping[str, type[StrictModel]]


def load_recipe(
    path: str | PathLike[str],
    overrides: Iterable[str] = (),
    method_configs: MethodConfigs | None = None,
    check_paths: bool = True,
    tasks_of: TasksOf | None = None,
) -> Recipe | StagedRecipe:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file. Paths inside are relative to its folder (`output`: to the working folder).
        overrides: `key=value` settings; a list is entered by index (`methods.0.top_k=1`).
        method_configs: method name -> settings class, `methods.registry.config_classes()`.
        check_paths: False = do not look whether the files exist (a recipe from another machine).
        tasks_of: method name -> the tasks that it does; asked where the task is not causal_lm, because it loads the method. Absent = a
            method that does not do the task is told by the plan.

    Returns:
        A `Recipe`, or a `StagedRecipe` of a file that holds `stages`.

    Raises:
        RecipeErrors: every fault, each with `file:line: key`, what was found and expected, and how to mend it.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no path"
        raise RecipeErrors(
            [RecipeError(str(path), f"no readable file ({reason})", "a recipe in YAML", "Check the path.")]
        ) from None
    return load_text(
        decode_or_raise(raw, str(path)), str(path), overrides, method_configs, file.parent, check_paths, tasks_of
    )


def load_text(
    text: str,
    name: str,
    overrides: Iterable[str] = (),
    method_configs: MethodConfigs | None = None,
    base_dir: Path | None = None,
    check_paths: bool = True,
    tasks_of: TasksOf | None = None,
) -> Recipe | StagedRecipe:
    """`load_recipe` for text that is not in a file; `name` stands for the file in messages."""
    try:
        tree = parse(text, name)
    except RecipeError as error:
        raise RecipeErrors([error]) from None
    apply_overrides(tree, overrides)
    methods, folder = method_configs or {}, base_dir or Path.cwd()
    splits: Splits = {}  # a file's held-out rows are held out of every stage

    def check_all(one: Tree) -> None:
        check(one, folder, check_paths, splits)
        check_task(one, tasks_of)

    recipe: Recipe | StagedRecipe | None
    if isinstance(tree.data, dict) and "stages" in tree.data:
        recipe = load_stages(tree, methods, lambda one: _validated(one, methods), check_all)
    else:
        recipe = _validated(tree, methods)
        check_all(tree)
    if tree.faults or recipe is None:
        raise RecipeErrors(sorted(tree.faults, key=_by_line))
    return recipe


def decode_or_raise(raw: bytes, name: str) -> str:
    try:
        return decode(raw, name)
    except RecipeError as error:
        raise RecipeErrors([error]) from None


def dump(recipe: Recipe | StagedRecipe) -> str:
    """The recipe as YAML that loads back equal. Settings that are absent by default and still absent are left out."""
    return dump_yaml(_plain(recipe))


def json_schema(method_configs: MethodConfigs) -> dict[str, Any]:
    """The JSON schema of a recipe, for editors; `sparsmith/recipe/schema.json` holds it for the built-in methods."""
    schema = _recipe_class(tuple(method_configs.items())).model_json_schema()
    _add_stages(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "sparsmith recipe"}


def _add_stages(schema: dict[str, Any]) -> None:
    """`stages` in place of `methods`. With it, each group may be split between the top level and the stages, so that what a group must
    hold is asked for only without it."""
    properties, definitions = schema["properties"], schema["$defs"]
    outline = Outline.model_json_schema()
    stage = StageOutline.model_json_schema()
    groups = {key: properties[key]["$ref"].rsplit("/", 1)[1] for key in ("data", "train")}
    required = {key: definitions[name].pop("required", []) for key, name in groups.items()}
    for key in ("methods", "data", "train", "proof"):
        about = {name: stage["properties"][key][name] for name in ("description",) if name in stage["properties"][key]}
        source = {name: value for name, value in properties[key].items() if name != "default"}
        stage["properties"][key] = {**source, **about}
    stage["required"] = ["methods"]
    definitions["Stage"] = {**stage, "title": "Stage"}
    described = outline["properties"]["stages"]
    properties["stages"] = {**described, "items": {"$ref": "#/$defs/Stage"}}
    whole = schema["required"]
    schema["required"] = [key for key in whole if key in ("model", "output")]
    schema["if"] = {"required": ["stages"]}
    schema["then"] = {"not": {"required": ["methods"]}}
    schema["else"] = {
        "required": [key for key in whole if key not in schema["required"]],
        "properties": {key: {"required": keys} for key, keys in required.items() if keys},
    }
    # what is trained on stands under one of two keys
    schema["else"]["properties"]["data"] = {"anyOf": [{"required": ["train"]}, {"required": ["mixture"]}]}


def _validated(tree: Tree, method_configs: MethodConfigs) -> Recipe | None:
    if not isinstance(tree.data, dict):
        found = "an empty file" if tree.data is None else "no settings"
        tree.fault((), found, "a recipe: model, methods, data, train, output", "Write the settings as `key: value`.")
        return None
    model = _recipe_class(tuple(method_configs.items()))
    try:
        checked = model.model_validate_json(json.dumps(tree.data), strict=True)
    except ValidationError as error:
        report(tree, error.errors(), Recipe, method_configs)
        return None
    except SparsmithError as error:  # raised by a method's own validator
        tree.fault(("methods",), error.found, error.expected, error.mend)
        return None
    recipe = Recipe.model_construct(**{name: getattr(checked, name) for name in checked.model_fields_set})
    if recipe.model.task == "causal_lm":
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})


@lru_cache(maxsize=8)
def _recipe_class(methods: tuple[tuple[str, type[StrictModel]], ...]) -> type[BaseModel]:
    """`Recipe` with its `methods` typed by the given classes, chosen by the key `method`."""

    class AnyMethod:
        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            choices = {name: handler.generate_schema(config) for name, config in methods}
            return core_schema.tagged_union_schema(choices, discriminator="method")

    entries = tuple[AnyMethod, ...]
    inherited = Recipe.model_fields["methods"]
    return create_model("RecipeOfMethods", __base__=Recipe, methods=(entries, inherited))


def _plain(value: Any) -> Any:
    """Settings -> dictionaries, lists and scalars, without fields that are None by default and in fact."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        pairs = ((name, getattr(value, name), field) for name, field in fields.items())
        return {name: _plain(item) for name, item, field in pairs if item is not None or field.default is not None}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _by_line(fault: RecipeError) -> tuple[bool, int]:
    """The file's faults in its order, then those of the command line."""
    if fault.where.startswith("command line"):
        return True, 0
    line = re.search(r":(\d+)(?::|$)", fault.where)
    return False, int(line.group(1)) if line else 0
