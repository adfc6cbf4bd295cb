"""What the settled gates leave of every block, and what of it the files of each form hold.

    uniform     every block of one shape, a stock class; whole closed blocks go
    per-layer   every block as wide as it is, a class of ours (`modeling.py`); a closed half is left out, whole closed blocks go
    padded      closed units fill every block up to the widest, with zeros: a stock class, exact; whole closed blocks go
    zeros       the original shapes; what is closed is zero
    auto        uniform where the blocks allow it, else per-layer

Nothing is changed here: a form that a model cannot take is refused before the first weight is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy, ModelShape
from sparsmith.errors import LayoutMismatch, UsageError, nearest
from sparsmith.methods.base import FORMS
from sparsmith.methods.finegates.families import becomes_mistral
from sparsmith.methods.finegates.gates import Gate, Site, sites


@dataclass(frozen=True)
class Part:
    """Indices of one block, ascending: what is open, or what the files hold."""

    units: tuple[int, ...]
    groups: tuple[int, ...]
    heads: tuple[int, ...]
    """Query heads, as indices into all heads of the model as it was."""
    attention: bool
    ffn: bool

    @classmethod
    def open_in(cls, site: Site, shape: ModelShape) -> Part:
        units, groups, heads = (site.gate(kind) for kind in ("units", "groups", "heads"))
        kept, each = _kept(groups, shape.kv_heads), shape.heads // shape.kv_heads
        inside = [h for h in _kept(heads, shape.heads) if h // each in kept]
        attention, ffn = (_is_open(site.gate(kind)) for kind in ("attention_block", "ffn_block"))
        return cls(_kept(units, shape.ffn_width), kept, tuple(inside), attention, ffn)

    def each(self, per_group: int) -> int:
        """Query heads of the group that has the most."""
        counts = [sum(h // per_group == g for h in self.heads) for g in self.groups]
        return max([*counts, 1])

    def filled(self, width: int, groups: int, each: int, shape: ModelShape) -> Part:
        """The same with closed ones added, the first first: so many units, groups, and heads in every group."""
        per_group = shape.heads // shape.kv_heads
        present = _fill(self.groups, range(shape.kv_heads), groups)
        heads: list[int] = []
        for group in present:
            own = range(group * per_group, (group + 1) * per_group)
            heads += _fill([h for h in self.heads if h in own], own, each)
        return Part(_fill(self.units, range(shape.ffn_width), width), present, tuple(heads), self.attention, self.ffn)


@dataclass(frozen=True)
class Layout:
    """A form, resolved for a model."""

    form: str
    """`uniform`, `per-layer`, `padded` or `zeros`."""
    open: tuple[Part, ...]
    present: tuple[Part | None, ...]
    """What the files hold; None for a block that is left out."""

    @property
    def kept_blocks(self) -> list[int]:
        return [index for index, part in enumerate(self.present) if part is not None]


def layout_of(model: nn.Module, form: str = "auto") -> Layout:
    """The form that `form` means for a settled model.

    Raises:
        LayoutMismatch: the model cannot take it; names the numbers that stand in the way.
        UsageError: no such form.
    """
    if form not in FORMS:
        raise UsageError("form", f"`{form}`", "one of " + ", ".join(FORMS), nearest(form, FORMS))
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
    parts = tuple(Part.open_in(site, shape) for site in sites(model))
    per_group = shape.heads // shape.kv_heads
    if form == "zeros":
        full = parts[0].filled(shape.ffn_width, shape.kv_heads, per_group, shape)
        return Layout(form, parts, tuple(Part(full.units, full.groups, full.heads, p.attention, p.ffn) for p in parts))
    alive = [part for part in parts if part.attention or part.ffn]
    if not alive:
        raise LayoutMismatch(
            "finegates.gates.blocks", "no open block", "at least one", "Export as zeros, or raise `target`."
        )
    if form == "padded":
        size = _padded_size(row, shape, alive, per_group)
        present = [p.filled(*size, shape) if p.attention or p.ffn else None for p in parts]
        return Layout(form, parts, tuple(present))
    own = [
        p.filled(len(p.units), len(p.groups), p.each(per_group), shape) if p.attention or p.ffn else None for p in parts
    ]
    fault = _uniform_fault(row, shape, own)
    if fault and form == "uniform":
        raise fault
    if not fault and form != "per-layer":
        return Layout("uniform", parts, tuple(own))
    _check_per_layer(model, fault)
    return Layout("per-layer", parts, tuple(own))


def _uniform_fault(row: Anatomy, shape: ModelShape, present: Sequence[Part | None]) -> LayoutMismatch | None:
    """Why the blocks do not make one stock shape."""
    where, mend = "finegates: form uniform", "Export as per-layer or padded, or settle with scope uniform."
    alive = [(index, part) for index, part in enumerate(present) if part is not None]
    lone = next(((index, part) for index, part in alive if not (part.attention and part.ffn)), None)
    if lone is not None:
        half = "FFN" if lone[1].attention else "attention"
        found = f"block {lone[0]}, of which the {half} alone is closed"
        return LayoutMismatch(where, found, "blocks that are open or closed as a whole", mend)
    named = (("FFN widths", "units"), ("key-value groups", "groups"), ("query heads", "heads"))
    for what, kind in named:
        counts = sorted({len(getattr(part, kind)) for _, part in alive})
        if len(counts) > 1:
            return LayoutMismatch(where, f"{what} from {counts[0]} to {counts[-1]}", "one number for all blocks", mend)
    heads = len(alive[0][1].heads)
    if not _heads_allowed(row, shape, heads):
        fits = [str(n) for n in range(1, shape.heads + 1) if shape.hidden % n == 0]
        found = f"{heads} of {shape.heads} query heads in {shape.model_type}"
        expected = f"a number that divides the hidden size {shape.hidden}: " + ", ".join(fits)
        return LayoutMismatch(where, found, expected, "Export as per-layer or padded, or keep one of these numbers.")
    return None


def _heads_allowed(row: Anatomy, shape: ModelShape, heads: int) -> bool:
    free = row.head_counts != "divides" or becomes_mistral(shape) or heads == shape.heads
    return free or shape.hidden % heads == 0


def _padded_size(row: Anatomy, shape: ModelShape, alive: Sequence[Part], per_group: int) -> tuple[int, int, int]:
    """(FFN width, groups, heads in each) of the widest block, the groups raised to what the family's config takes."""
    width = max(len(part.units) for part in alive)
    each = max(part.each(per_group) for part in alive)
    groups = max(len(part.groups) for part in alive)
    while not _heads_allowed(row, shape, groups * each) and groups < shape.kv_heads:
        groups += 1
    if not _heads_allowed(row, shape, groups * each):
        each = per_group
    return width, groups, each


def _check_per_layer(model: Any, fault: LayoutMismatch | None) -> None:
    """A per-layer model is a causal LM of one of ten families, not wrapped in the class of another method."""
    why = ""
    if anatomy.base_of(model) is not model:
        why = "another method's own class around it"
    elif not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        why = f"{type(model).__name__}, which is no causal language model"
    if why:
        found = f"{why}, and {fault.found}" if fault else why
        mend = "Export as padded or zeros, or settle with scope uniform and gates.blocks false."
        raise LayoutMismatch("finegates: form per-layer", found, "a plain causal language model", mend) from fault


def _fill(kept: Sequence[int], pool: Sequence[int], count: int) -> tuple[int, ...]:
    """`kept` and as many of the others as are missing."""
    held = set(kept)
    others = [index for index in pool if index not in held]
    return tuple(sorted([*kept, *others[: max(0, count - len(kept))]]))


def _kept(gate: Gate | None, size: int) -> tuple[int, ...]:
    return tuple(range(size)) if gate is None else tuple(torch.nonzero(gate.kept.cpu()).flatten().tolist())


def _is_open(gate: Gate | None) -> bool:
    return gate is None or bool(gate.kept[0])
