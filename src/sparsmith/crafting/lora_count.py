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


def target_paths(row: Anatomy, settings: LoraSettings) -> tuple[str, ...]:
    """Paths inside a block of the linears that get a LoRA. A target is such a path, or the end of one: of several, all are meant
    (`c_proj` of GPT-2 names an attention and an FFN linear).

    Raises:
        MethodError: a name that the family does not have.
    """
    paths = tuple(row.linears)
    if settings.targets == "all-linear":
        return paths
    wanted = (settings.targets,) if isinstance(settings.targets, str) else tuple(settings.targets)
    for name in wanted:
        if not any(_ends(path, name) for path in paths):
            known = tuple(dict.fromkeys((*(path.rsplit(".", 1)[-1] for path in paths), *paths)))
            raise MethodError("lora.targets", f"`{name}`", "a linear of this family", nearest(name, known))
    return tuple(path for path in paths if any(_ends(path, name) for name in wanted))


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def lora_parameters_of(settings: LoraSettings | None, row: Anatomy, shape: ModelShape) -> int:
    """r * (in + out) for every targeted linear of every block; 0 without a LoRA."""
    if settings is None:
        return 0
    wanted = target_paths(row, settings)
    sizes = [i + o for path, (i, o) in shape.linears.items() if path in wanted]
    return shape.layers * settings.r * sum(sizes)
