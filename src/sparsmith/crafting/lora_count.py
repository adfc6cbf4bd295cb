"""How many parameters a LoRA has, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsmith.errors import MethodError, nearest
from sparsmith.methods.base import LoraSettings, Method, MethodConfig

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape


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


def target_names(row: Anatomy, settings: LoraSettings) -> tuple[str, ...]:
    """The linears (their last path component) that get a LoRA.

    Raises:
        MethodError: a name that the family does not have.
    """
    known = tuple(dict.fromkeys((*row.attention_linears, *row.ffn_linears)))
    wanted = known if settings.targets == "all-linear" else settings.targets
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for name in wanted:
        if name not in known:
            raise MethodError("lora.targets", f"`{name}`", "a linear of this family", nearest(name, known))
    return wanted


def lora_parameters_of(settings: LoraSettings | None, row: Anatomy, shape: ModelShape) -> int:
    """r * (in + out) for every targeted linear of every block; 0 without a LoRA."""
    if settings is None:
        return 0
    wanted = target_names(row, settings)
    sizes = [i + o for name, (i, o) in shape.linears.items() if name.rsplit(".", 1)[-1] in wanted]
    return shape.layers * settings.r * sum(sizes)
