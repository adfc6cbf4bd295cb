"""What a crafted model knows of its own making."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import anatomy
from sparsmith.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from sparsmith.methods.base import Method, MethodConfig

_RECORD = "sparsmith"
_BASE = "sparsmith_base"


@dataclass(frozen=True)
class BaseRecord:
    """Where a base came from."""

    id: str
    """Folder or hub id, as the user named it."""
    folder: Path | None = None
    """The folder on disk that was read; None for a model that came as an object."""
    revision: str | None = None
    quant: str = "none"
    dtype: str = "float32"
    task: str = "causal_lm"
    labels: tuple[str, ...] = ()
    """Of a classifier the names of its classes."""


@dataclass(frozen=True)
class SliceRecord:
    """Of a model that was cut out of a depth-elastic one: where."""

    depth: int
    """The exit that it is, in blocks of the parent."""
    of: int
    """Blocks of the parent."""
    exits: tuple[int, ...]
    """Of the parent."""
    parent: str
    """Hash of the settled parent's tensors, as `crafting.tensors.content_hash` tells it."""
    configs: tuple[dict[str, Any], ...]
    """How the parent was made."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exits": list(self.exits), "configs": list(self.configs)}


@dataclass(frozen=True)
class CraftRecord:
    """The configs that shaped a model, in their order, and the base that they shaped."""

    configs: tuple[MethodConfig, ...]
    base: BaseRecord
    seed: int = 42
    neutral: dict = field(default_factory=dict)
    """Result of the proof that crafting left the function unchanged."""
    slice: SliceRecord | None = None
    """Where it was cut out, of a slice."""
    form: str | None = None
    """The form that a settled model was pruned into (`methods.base.FORMS`); None where no method deletes anything, or not yet."""

    @property
    def base_id(self) -> str:
        return self.base.id

    @property
    def quant(self) -> str:
        return self.base.quant

    @property
    def parts(self) -> tuple[tuple[Method, MethodConfig], ...]:
        """(method, config) pairs."""
        from sparsmith.methods import registry

        return tuple((registry.of(config), config) for config in self.configs)


def attach(model: nn.Module, record: CraftRecord) -> None:
    """Write the record onto the model (a plain attribute, not part of its state)."""
    object.__setattr__(model, _RECORD, record)


def record_of(model: nn.Module) -> CraftRecord:
    """The record of a crafted model."""
    record = getattr(model, _RECORD, None)
    if not isinstance(record, CraftRecord):
        raise CheckpointError(
            type(model).__name__,
            "a model without a record of its crafting",
            "a model that came from sparsmith.craft or sparsmith.load",
            "Craft the model first, or load it with sparsmith.load.",
        )
    return record


def attach_base(model: nn.Module, base: BaseRecord) -> None:
    object.__setattr__(model, _BASE, base)


def base_of(model: nn.Module) -> BaseRecord:
    """The record of a base; for a model that the caller made, one drawn from its config."""
    known = getattr(model, _BASE, None)
    if isinstance(known, BaseRecord):
        return known
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    folder = Path(name) if name and Path(name).is_dir() else None
    parameter = next(model.parameters(), None)
    dtype = str(parameter.dtype).removeprefix("torch.") if parameter is not None else "float32"
    quant = "nf4" if getattr(model, "is_loaded_in_4bit", False) else "none"
    return BaseRecord(
        id=name, folder=folder, quant=quant, dtype=dtype, task=anatomy.task_of(model), labels=labels_of(model)
    )


def labels_of(model: Any) -> tuple[str, ...]:
    """Names of the classes of a sequence classifier, in order; () for a language model."""
    if anatomy.task_of(model) != anatomy.SEQ_CLS:
        return ()
    return tuple(str(name) for _, name in sorted(model.config.id2label.items()))
