"""The first two columns of the accounting, worked out from the settled gates before anything is cut, and the histogram of the scales.

counted     of the linear weights of the blocks: sum of numel - open rows x open columns, as the reference counts; soft gates are kept
deletable   parameters that a form leaves out exactly, biases and norms of what goes included
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy, ModelShape
from sparsmith.methods.finegates.forms import Layout, Part, layout_of
from sparsmith.methods.finegates.gates import KINDS, Gate, GatedLinear, GateState, sites

BINS = 10


def tables(model: nn.Module, form: str) -> dict[str, Any]:
    """`accounting` and `scales` of a settled model that still has its gates.

    Args:
        form: a resolved form of `forms.py`.
    """
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
    layout = layout_of(model, form)
    linears = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears.values())
    accounting = columns(model, layout.form, (counted(layout, row, shape), linears), deletable(layout, row, shape))
    return {"accounting": accounting, "scales": histograms(model, layout)}


def columns(model: nn.Module, form: str, counted: tuple[int, int], kinds: Mapping[str, int]) -> dict[str, Any]:
    """The two columns as data, with the config of the dense model.

    Args:
        counted: (removed, of so many).
        kinds: tensor kind -> parameters that go.
    """
    base: Any = anatomy.base_of(model)
    total, removed = plain_numel(model), sum(kinds.values())
    gone, linears = counted
    return {
        "form": form,
        "base": {"parameters": total, "of": "the model before the cut, all parameters, tied ones once"},
        "counted": {
            "removed": gone,
            "total": linears,
            "share": gone / linears,
            "of": "the linear weights of the blocks",
        },
        "deletable": {
            "removed": removed,
            "total": total,
            "share": removed / total,
            "of": "all parameters",
            "kinds": dict(kinds),
        },
        "dense_config": {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"},
    }


def plain_numel(model: nn.Module) -> int:
    """Numbers that a checkpoint of this model would hold if it had no gates: tied tensors once."""
    skip = {name for name, module in model.named_modules() if isinstance(module, Gate | GateState)}
    seen: dict[int, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, last = name.rpartition(".")
        watched = isinstance(model.get_submodule(owner), GatedLinear) and last.startswith("input_")
        if isinstance(tensor, torch.Tensor) and not watched and owner not in skip:
            seen[id(tensor)] = tensor.numel()
    return sum(seen.values())


def counted(layout: Layout, row: Anatomy, shape: ModelShape) -> int:
    """Linear weights whose row or column is closed."""
    gone = 0
    for part in layout.open:
        sizes = _linear_sizes(part, row, shape)
        for name, (inputs, outputs) in shape.linears.items():
            gone += inputs * outputs - sizes[name][0] * sizes[name][1]
    return gone


def deletable(layout: Layout, row: Anatomy, shape: ModelShape) -> dict[str, int]:
    """Tensor kind -> parameters that the form leaves out. `norms`: of blocks that go whole, and inside an attention that goes."""
    kinds = dict.fromkeys(shape.linears, 0) | {"biases": 0, "norms": 0}
    if layout.form == "zeros":
        return kinds
    inner = {"none": 0, "head": 2 * shape.head_dim, "full": (shape.heads + shape.kv_heads) * shape.head_dim}[
        row.qk_norm
    ]
    each = (shape.norm_params - shape.final_norm_params) // shape.layers
    drops_halves = layout.form == "per-layer"
    for part in layout.present:
        sizes = _linear_sizes(part, row, shape, drops_halves)
        for name, (inputs, outputs) in shape.linears.items():
            kinds[name] += inputs * outputs - sizes[name][0] * sizes[name][1]
            if name in shape.biases:
                kinds["biases"] += outputs - sizes[name][1]
        if part is None:
            kinds["norms"] += each
        elif drops_halves and not part.attention:
            kinds["norms"] += inner
    return kinds


def _linear_sizes(
    part: Part | None, row: Anatomy, shape: ModelShape, halves: bool = True
) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear that are left; (0, 0) of a half that goes. `halves`: a closed half counts as gone."""
    h = shape.head_dim
    attention_on, ffn_on = (part is not None and (getattr(part, half) or not halves) for half in ("attention", "ffn"))
    queries, keys, units = (len(part.heads) * h, len(part.groups) * h, len(part.units)) if part else (0, 0, 0)
    *inward, _ = row.attention_linears
    outputs = (queries, keys, keys) if len(inward) == 3 else (queries + 2 * keys,)
    names = list(shape.attention_linears)
    sizes = {name: (shape.hidden, size) if attention_on else (0, 0) for name, size in zip(names, outputs)}
    sizes[names[-1]] = (queries, shape.hidden) if attention_on else (0, 0)
    into = 2 * units if row.ffn_kind == "fused_gated" else units
    *first, last = shape.ffn_linears
    sizes |= dict.fromkeys(first, (shape.hidden, into) if ffn_on else (0, 0))
    return {**sizes, last: (units, shape.hidden) if ffn_on else (0, 0)}


def histograms(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """Of every scale that is folded into a weight. Kind -> `edges` (of 10 bins over (0, 1)), `counts` (the bins, then those that are
    exactly 1), `kept`: their sum."""
    found = {}
    for kind in KINDS:
        values = [
            gate.folded().float().cpu()[list(_folded(kind, part))]
            for site, part in zip(sites(model), layout.open)
            if (gate := site.gate(kind)) is not None
        ]
        if values:
            found[kind] = _histogram(values)
    return found


def _folded(kind: str, part: Part) -> tuple[int, ...]:
    """Indices of a block's gates of one kind that end in a weight: none of a half that is closed, no head of a closed group."""
    on = part.ffn if kind in ("units", "ffn_block") else part.attention
    every = (0,) if kind.endswith("block") else getattr(part, kind)
    return every if on else ()


def _histogram(values: Sequence[torch.Tensor]) -> dict[str, Any]:
    scales = torch.cat(list(values))
    soft = scales[scales < 1]
    counts = torch.bincount((soft * BINS).long().clamp(0, BINS - 1), minlength=BINS).tolist()
    return {
        "edges": [edge / BINS for edge in range(BINS + 1)],
        "counts": [*counts, int((scales >= 1).sum())],
        "kept": scales.numel(),
    }
