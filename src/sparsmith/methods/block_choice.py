"""Which blocks a method shapes: `all`, `every-n`, or a list of indices. No torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from sparsmith.errors import MethodError


def _read(value: Any) -> Any:
    if isinstance(value, str):
        step = value.removeprefix("every-")
        if value != "all" and not (value != step and step.isdigit() and int(step) >= 1):
            raise ValueError("layers is `all`, `every-n` with n >= 1, or a list of block indices")
        return value
    indices = tuple(value) if isinstance(value, (list, tuple, range)) else value
    if not isinstance(indices, tuple) or not indices or len(set(indices)) != len(indices):
        raise ValueError("layers as a list must name at least one block, each once")
    return indices


BlockChoice = Annotated[str | tuple[int, ...], BeforeValidator(_read)]
"""A setting's type."""


def block_indices(choice: str | tuple[int, ...], layers: int, where: str) -> tuple[int, ...]:
    """The chosen blocks of a model with `layers` blocks, ascending; `every-n` are blocks n-1, 2n-1, ...

    Raises:
        MethodError: one that is not there; `where` names the setting.
    """
    if choice == "all":
        return tuple(range(layers))
    if isinstance(choice, str):
        step = int(choice.removeprefix("every-"))
        chosen = tuple(range(step - 1, layers, step))
        if not chosen:
            raise MethodError(where, f"`{choice}`", f"n <= {layers}", "The model has fewer blocks.")
        return chosen
    wrong = [index for index in choice if not 0 <= index < layers]
    if wrong:
        raise MethodError(where, str(wrong), f"indices from 0 to {layers - 1}", "Blocks count from 0.")
    return tuple(sorted(choice))
