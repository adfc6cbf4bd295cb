"""A recipe of several stages: each crafts and tunes what the one before has settled into.

In the file a stage holds its methods and, of `data`, `train` and `proof`, what differs from the recipe's top level. Once loaded, every
stage is whole.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializeAsAny

from sparsmith.recipe.schema import DataSettings, ModelSettings, Name, ProofSettings, Recipe, Text, TrainSettings
from sparsmith.recipe.strict import StrictModel

GROUPS = ("data", "train", "proof")
"""Groups that a stage may hold, key by key in place of the top level's."""


class Stage(StrictModel):
    """One stage, whole."""

    name: Name
    methods: Annotated[tuple[SerializeAsAny[StrictModel], ...], Field(min_length=1)]
    data: DataSettings
    train: TrainSettings
    proof: ProofSettings = ProofSettings()


class StagedRecipe(StrictModel):
    """A recipe with `stages` in place of `methods`."""

    model: ModelSettings
    """The base of the first stage; its number type, quantisation and attention hold for every stage."""
    stages: tuple[Stage, ...]
    output: Text

    def recipe(self, index: int, model: ModelSettings | None = None, output: str | None = None) -> Recipe:
        """The stage as a recipe of its own.

        Args:
            index: of the stage, from 0.
            model: what it starts from; None = the base.
            output: its folder; None = that of the whole.
        """
        stage = self.stages[index]
        return Recipe.model_construct(
            model=model or self.model,
            methods=stage.methods,
            data=stage.data,
            train=stage.train,
            output=output or self.output,
            proof=stage.proof,
        )

    def model_at(self, folder: str) -> ModelSettings:
        """The settings by which a later stage opens the folder that the one before has settled into."""
        return self.model.model_copy(update={"path": folder, "revision": None, "trust_remote_code": False})


class StageOutline(StrictModel):
    """The keys of a stage as it stands in the file; what they hold is checked once it is whole."""

    name: Name | None = None
    """Part of the stage's folder; absent = its methods' names."""
    methods: Any = None
    data: dict[str, Any] = {}
    """Keys in place of those of the recipe's `data`."""
    train: dict[str, Any] = {}
    """Keys in place of those of the recipe's `train`."""
    proof: dict[str, Any] = {}
    """Keys in place of those of the recipe's `proof`."""


class Outline(StrictModel):
    """The keys of a recipe of several stages as it stands in the file."""

    model: Any = None
    data: Any = None
    train: Any = None
    proof: Any = None
    output: Any = None
    stages: Annotated[tuple[StageOutline, ...], Field(min_length=2)]
    """In place of `methods`: at least two stages, each {name?, methods, data?, train?, proof?}, which start from the settled result of
    the one before. Keys that a stage leaves out are those of the top level."""


def name_of(given: Any, methods: Any) -> str:
    """The stage's name: the given one, else its methods' names."""
    if isinstance(given, str):
        return given
    return "+".join(str(config.method) for config in methods)[:64]
