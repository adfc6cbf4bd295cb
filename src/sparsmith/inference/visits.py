"""Which depths a confidence exit looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsmith import anatomy
from sparsmith.crafting.slices import depths_of
from sparsmith.errors import MethodError

if TYPE_CHECKING:
    from torch import nn

MAX_VISITS = 3
"""Depths visited by default below the full one: each costs a head per token."""


def chosen_visits(model: nn.Module, visit: Sequence[int] | None) -> tuple[int, ...]:
    """Ascending depths below the full one: those asked for, else all of the model's, thinned evenly to three.

    Raises:
        MethodError: a depth that is no exit of the model.
    """
    layers = len(anatomy.blocks(model))
    known = [depth for depth in depths_of(model) if depth < layers]
    if visit is None:
        if len(known) <= MAX_VISITS:
            return tuple(known)
        last = len(known) - 1
        return tuple(known[round(place * last / (MAX_VISITS - 1))] for place in range(MAX_VISITS))
    for depth in visit:
        if depth != layers and depth not in known:
            raise MethodError(
                "visit",
                f"depth `{depth}`",
                "some of " + ", ".join(map(str, known)) if known else "a model that was tuned with exits",
                "Only depths that were tuned as exits can be read out.",
            )
    return tuple(sorted({depth for depth in visit if depth != layers}))
