"""What the paths of a recipe mean: a file or folder beside the recipe, a hub id, or the embedded base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from sparsmith.recipe.mixture import MixtureSettings, TaskSource
from sparsmith.recipe.protocol import Suites
from sparsmith.recipe.schema import Recipe
from sparsmith.recipe.staged import StagedRecipe
from sparsmith.recipe.templates import is_file_name

RecipeT = TypeVar("RecipeT", bound=Recipe | StagedRecipe)

EMBEDDED = "embedded"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".safetensors", ".yaml", ".yml")


def exists(path: Path) -> bool:
    """`Path.exists`, where a name that no file system takes is just absent."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def resolve(text: str, base_dir: Path) -> Path:
    """The local path that the text means, relative to the recipe's folder; `~` is the home folder."""
    path = Path(text)
    if text.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:  # `~nobody`
            return base_dir / path
    return base_dir / path


def is_hub_id(text: str, base_dir: Path) -> bool:
    """True for `owner/name` that is no local path: nothing stands there, nor is `owner` a folder here, nor does the name end like a
    file's."""
    if not _HUB_ID.match(text) or text.endswith(_FILE_ENDINGS):
        return False
    return not exists(resolve(text, base_dir)) and not exists(resolve(text.split("/")[0], base_dir))


def absolute(text: str, base_dir: Path) -> str:
    """The text with a local path made absolute; hub ids and `embedded` stay."""
    if text == EMBEDDED or is_hub_id(text, base_dir):
        return text
    return str(resolve(text, base_dir).resolve())


def with_absolute_paths(recipe: RecipeT, base_dir: Path) -> RecipeT:
    """The recipe as a run writes it down: readable from any folder."""

    def moved(source):
        return source.model_copy(update={"path": absolute(source.path, base_dir)})

    def with_data(part):
        sides: dict[str, Any] = {"train": tuple(map(moved, part.data.train)), "eval": tuple(map(moved, part.data.eval))}
        if part.data.mixture is not None:
            sides["mixture"] = _mixture_at(part.data.mixture, base_dir)
        return {"data": part.data.model_copy(update=sides)}

    def with_protocol(settings):
        if settings is None:
            return None
        tasks = tuple(task.model_copy(update=with_task(task)) for task in settings.tasks)
        sides = {name: side.model_copy(update=with_side(side)) for name, side in settings.sides.items()}
        suites = settings.suites and _suites_at(settings.suites, base_dir)
        return settings.model_copy(update={"tasks": tasks, "sides": sides, "suites": suites})

    def with_task(task):
        parts = (("train", task.train), ("eval", task.eval), ("validation", task.validation))
        return {name: moved(source) for name, source in parts if source is not None}

    def with_side(side):
        found = {} if side.path is None else {"path": absolute(side.path, base_dir)}
        if side.start is not None:
            found["start"] = side.start.model_copy(update={"train": tuple(map(moved, side.start.train))})
        return found

    update = {"model": recipe.model.model_copy(update={"path": absolute(recipe.model.path, base_dir)})}
    if isinstance(recipe, StagedRecipe):
        stages = tuple(stage.model_copy(update=with_data(stage)) for stage in recipe.stages)
        return recipe.model_copy(update={**update, "stages": stages})
    return recipe.model_copy(update={**update, **with_data(recipe), "protocol": with_protocol(recipe.protocol)})


def _mixture_at(mixture: MixtureSettings, base_dir: Path) -> MixtureSettings:
    """The mixture with absolute paths of rows and of templates."""

    def moved(task: TaskSource) -> TaskSource:
        templates = task.templates
        if is_file_name(templates):
            templates = str(resolve(templates, base_dir).resolve())
        return task.model_copy(update={"path": absolute(task.path, base_dir), "templates": templates})

    parts = tuple(sub.model_copy(update={"tasks": tuple(map(moved, sub.tasks))}) for sub in mixture.submixtures)
    return mixture.model_copy(update={"submixtures": parts})


def _suites_at(suites: Suites, base_dir: Path) -> Suites:
    """The suites with absolute paths; a text that is no path here is a name, which the reader of tasks judges."""

    def moved(text: str) -> str:
        path = resolve(text, base_dir)
        return str(path.resolve()) if exists(path) else text

    data = None if suites.data is None else str(resolve(suites.data, base_dir).resolve())
    return suites.model_copy(update={"tasks": tuple(map(moved, suites.tasks)), "data": data})
