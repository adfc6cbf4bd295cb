"""One depth of a depth-elastic model, as a model: a view that shares every tensor, and can be run, measured and saved.

Paper: Sorted LLaMA (arXiv 2309.08968) §3: sub-model n = embedding + blocks 1..n + the final norm + the head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from sparsmith import anatomy
from sparsmith.anatomy import views
from sparsmith.crafting.record import CraftRecord, SliceRecord, attach, record_of
from sparsmith.errors import CheckpointError, MethodError


def depths_of(model: nn.Module) -> tuple[int, ...]:
    """The depths at which a model may be read out, in blocks, ascending; the full depth alone for a model that is not elastic."""
    layers = len(anatomy.blocks(model))
    record = _record(model)
    found: set[int] = {layers}
    for method, config in record.parts if record else ():
        found |= set(method.depths(config, layers))
    return tuple(sorted(found))


def at_depth(model: nn.Module, depth: int) -> Any:
    """The sub-model of the first `depth` blocks, as a causal LM of the model's own class. The model is left as it is.

    Raises:
        MethodError: not one of `depths_of(model)`.
    """
    known = depths_of(model)
    if depth not in known:
        raise MethodError(
            "depth",
            f"`{depth}`",
            "one of " + ", ".join(map(str, known)),
            "Only depths that were tuned as exits can be read out."
            if len(known) > 1
            else "Tune the model with `method: soft` for other depths.",
        )
    if depth == known[-1]:
        return model
    return _cut(model, depth)


def slice_of(model: nn.Module, depth: int | None = None, *, parent: str = "") -> Any:
    """What a checkpoint of its own holds of one depth: `at_depth`, and of the full depth the model without what its other exits own.

    Args:
        depth: one of `depths_of(model)`; None = the full depth, which is the model itself where the exits own nothing.
        parent: hash of the settled model, for the record.
    """
    layers = len(anatomy.blocks(model))
    if depth is None and not _exits_own(model):
        return model
    found = _cut(model, layers) if depth in (None, layers) and _record(model) else at_depth(model, depth or layers)
    record = _record(model)
    if record is not None:
        configs = tuple(config.model_dump(mode="json") for config in record.configs)
        stamp = SliceRecord(depth or layers, layers, depths_of(model), parent, configs)
        attach(found, replace(cast(CraftRecord, _record(found)), slice=stamp))
    return found


def _exits_own(model: nn.Module) -> bool:
    """Whether the model holds blocks or heads that only some of its exits use."""
    record = _record(model)
    return any(method.exits_own(model, config) for method, config in record.parts) if record else False


def _cut(model: nn.Module, depth: int) -> Any:
    record = cast(CraftRecord, _record(model))
    tail = [block for method, config in record.parts for block in method.tail_at(model, config, depth)]
    view = views.first_blocks(model, depth, tail)
    cut = [(method, method.cut(view, config, depth, len(anatomy.blocks(model)))) for method, config in record.parts]
    kept = tuple(config for _, config in cut if config is not None)
    if all(type(view).__module__ not in method.standalone_sources() for method, config in cut if config is not None):
        view = anatomy.base_of(view)  # of a wrapper nothing is left
    attach(view, replace(record, configs=kept))
    return view


def _record(model: nn.Module) -> CraftRecord | None:
    try:
        return record_of(model)
    except CheckpointError:
        return None
