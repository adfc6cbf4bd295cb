"""Where a LoRA goes and how many parameters it has, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsmith.errors import MethodError, nearest
from sparsmith.methods.base import LoraSettings, Method, MethodConfig

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape

Sizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class LoraPlaces:
    """What of a model gets a LoRA. Every table: name -> (inputs, outputs); r * (inputs + outputs) parameters each."""

    everywhere: Sizes
    """Linears of every block, by their path in it: those of the attention, and of a dense model those of the FFN."""
    dense: Sizes = field(default_factory=dict)
    """FFN linears of the blocks of a mixture whose FFN is dense, by their path in the block."""
    shared: Sizes = field(default_factory=dict)
    """Linears of the expert that every token takes beside its own, by their name there."""
    stacked: Sizes = field(default_factory=dict)
    """Stacked tensors of the experts, by their name in the experts' module: a pair of factors for each expert."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths inside a block, in the order of the family's row, attention first."""
        return (*self.everywhere, *self.dense)


def merged_settings(parts: Sequence[tuple[Method, MethodConfig]], shape: ModelShape) -> LoraSettings | None:
    """The one LoRA of a composition: methods that ask for one must ask for the same."""
    asked = {
        method.name: settings
        for method, config in parts
        if (settings := method.lora(config, shape)) and settings.enabled
    }
    if len(set(asked.values())) > 1:
        raise MethodError(
            "lora", "different settings in " + ", ".join(asked), "one LoRA", "Give the same `lora` to each."
        )
    return next(iter(asked.values()), None)


def adapts_experts(parts: Sequence[tuple[Method, MethodConfig]]) -> bool:
    """Whether the LoRA of a composition goes on the stacked experts too."""
    return any(method.adapts_experts(config) for method, config in parts)


def lora_places(settings: LoraSettings, row: Anatomy, shape: ModelShape, experts: bool = False) -> LoraPlaces:
    """What gets a LoRA. A target is a path inside a block, or the end of one: of several, all are meant (`c_proj` of GPT-2 names an
    attention and an FFN linear; `down_proj` of a mixture the linear of dense blocks, of the shared expert, and the stacked tensor).

    Args:
        experts: whether the stacked experts may be adapted.

    Raises:
        MethodError: a name that the model does not have.
    """
    sparse = shape.sparse
    ffn = shape.ffn_linears if shape.dense_blocks else {}
    everywhere = dict(shape.attention_linears) if sparse else {**shape.attention_linears, **ffn}
    found = LoraPlaces(
        everywhere=everywhere,
        dense=ffn if sparse else {},
        shared=sparse.shared_linears if sparse and sparse.blocks else {},
        stacked=sparse.stacked if experts and sparse and sparse.blocks else {},
    )
    if settings.targets == "all-linear":
        return found
    wanted = (settings.targets,) if isinstance(settings.targets, str) else tuple(settings.targets)
    shared, stacked = f"{row.ffn}.shared_expert.", f"{row.ffn}.{row.experts}."
    paths = (*found.linears, *(shared + name for name in found.shared), *(stacked + name for name in found.stacked))
    for name in wanted:
        if not any(_ends(path, name) for path in paths):
            known = tuple(dict.fromkeys((*(path.rsplit(".", 1)[-1] for path in paths), *paths)))
            raise MethodError("lora.targets", f"`{name}`", "a linear of this model", nearest(name, known))

    def named(table: Sizes, home: str = "") -> dict[str, tuple[int, int]]:
        return {path: size for path, size in table.items() if any(_ends(f"{home}{path}", name) for name in wanted)}

    return LoraPlaces(
        everywhere=named(found.everywhere),
        dense=named(found.dense),
        shared=named(found.shared, shared),
        stacked=named(found.stacked, stacked),
    )


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def lora_parameters_of(
    settings: LoraSettings | None, row: Anatomy, shape: ModelShape, experts: bool = False
) -> tuple[int, int]:
    """(of linears, of stacked experts): r * (in + out) for every targeted linear of every block, and for every expert of every targeted
    stacked tensor; zeros without a LoRA."""
    if settings is None:
        return 0, 0
    places, sparse = lora_places(settings, row, shape, experts), shape.sparse
    blocks = len(sparse.blocks) if sparse else 0
    linears = shape.layers * _sides(places.everywhere) + shape.dense_blocks * _sides(places.dense)
    linears += blocks * _sides(places.shared)
    stacked = blocks * sparse.experts * _sides(places.stacked) if sparse else 0
    return settings.r * linears, settings.r * stacked


def adapted_weights(settings: LoraSettings | None, row: Anatomy, shape: ModelShape, experts: bool) -> int:
    """Weights of the stacked tensors of one sparse block that a LoRA changes: every forward computes their sum with it anew."""
    sparse = shape.sparse
    if settings is None or sparse is None:
        return 0
    return sparse.experts * sum(i * o for i, o in lora_places(settings, row, shape, experts).stacked.values())


def _sides(table: Sizes) -> int:
    return sum(i + o for i, o in table.values())
