"""The plan of FineGates, from shapes alone: what will be gated, what will go, and whether the size asked for can be reached."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from sparsmith import anatomy
from sparsmith.errors import MethodError
from sparsmith.methods.base import MethodPlan, ModuleChange
from sparsmith.methods.finegates.choose import fit
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.families import (
    Costs,
    as_mistral_config,
    attention_gates,
    attention_refusal,
    becomes_mistral,
    kept_groups_allowed,
    unit_of,
)
from sparsmith.methods.finegates.size import Sizes

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape


def expected(config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> tuple[int, int]:
    """(groups, FFN width) of every layer if attention gives as large a share as the whole; the learned run may move between the two.

    Raises:
        TargetUnreachable.
    """
    sizes = Sizes.from_shape(config, row, shape)
    gated = attention_gates(config, row) != "none"
    allowed = kept_groups_allowed(row, shape) if gated else (shape.kv_heads,)
    return fit(config, sizes, allowed, config.target * shape.kv_heads, shape.heads // shape.kv_heads)


def settled_config(config: FineGatesConfig, base_config: Any) -> Any:
    """The base's config with the sizes that the plan expects; Mistral's where Llama's refuses the heads, as settling does.

    Raises:
        MethodError: the layout or scope leaves no stock model. TargetUnreachable.
    """
    if not config.cuts:
        return base_config
    if not config.structured or config.settle.scope != "uniform" or config.gates.blocks:
        found = "gates.blocks or settle.scope global, whose layers may differ" if config.structured else "layout paper"
        expected_ = "one smaller shape for all layers, where another stage follows"
        raise MethodError(
            "methods: finegates", found, expected_, "Take layout structured, settle.scope uniform and no gates.blocks."
        )
    row, shape = anatomy.of(base_config), anatomy.shape_of(base_config)
    groups, width = expected(config, row, shape)
    heads = groups * (shape.heads // shape.kv_heads)
    settled = copy.deepcopy(base_config)
    setattr(settled, "intermediate_size" if hasattr(settled, "intermediate_size") else "n_inner", width)
    if heads == shape.heads:
        return settled
    # past the config's own checks: Llama's refuses head counts that do not divide the hidden size
    settled.__dict__.update(num_attention_heads=heads, num_key_value_heads=groups, head_dim=shape.head_dim)
    if becomes_mistral(shape) and shape.hidden % heads != 0:
        return as_mistral_config(settled)
    return settled


def settled_note(config: FineGatesConfig) -> str:
    """What of the settled size is learned."""
    if config.cuts and config.gates.attention != "none":
        return "how attention and FFN share the cut is learned, so that the widths are an expectation"
    return ""


def check(config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> None:
    """Refuse a size that cannot be reached."""
    if config.cuts and config.structured:
        expected(config, row, shape)


def gate_count(config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> int:
    """Gates of all kinds in all blocks."""
    heads = attention_gates(config, row)
    each = shape.ffn_width * config.gates.ffn + shape.kv_heads * (heads != "none")
    each += shape.heads * (heads == "kv_groups+q_heads") + 2 * config.gates.blocks
    return shape.layers * each


def plan(config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> MethodPlan:
    if not config.cuts:
        return MethodPlan(changes=(), added={}, notes=("baseline lora: nothing is cut",))
    groups, width = expected(config, row, shape)
    heads = groups * (shape.heads // shape.kv_heads)
    costs = Costs.of(config.model_copy(update={"target_unit": "params"}), row, shape)
    gone = (shape.ffn_width - width) * costs.unit + (shape.kv_heads - groups) * costs.group
    gone += (shape.heads - heads) * costs.head
    scores = 2 * 2 * (shape.heads - heads) * shape.head_dim
    blocks = f"{row.blocks}.{{0..{shape.layers - 1}}}"
    changes = []
    if config.gates.ffn:
        what = f"{shape.ffn_width} gated channels, about {width} stay"
        changes.append(ModuleChange(f"{blocks}.{row.ffn}", what, shape.layers))
    if attention_gates(config, row) != "none":
        what = f"{shape.kv_heads} gated key-value groups, about {groups} stay"
        changes.append(ModuleChange(f"{blocks}.{row.attention}", what, shape.layers))
    if config.gates.blocks:
        changes.append(ModuleChange(blocks, "attention and FFN gated as a whole", 2 * shape.layers))
    gates = gate_count(config, row, shape)
    trained = gates * (int(config.learned) + int(config.settle.train_scales))
    removed = round(shape.layers * gone)
    return MethodPlan(
        changes=tuple(changes),
        added={},
        removed=removed,
        trained={"gate": trained} if trained else {},
        flops_forward=-2 * removed,
        activation_floats=shape.layers * (shape.ffn_width + shape.heads * shape.head_dim),
        notes=_notes(config, row, shape, groups, width, scores),
    )


def _notes(
    config: FineGatesConfig, row: Anatomy, shape: ModelShape, groups: int, width: int, scores: int
) -> tuple[str, ...]:
    unit = unit_of(config, shape.ffn_width)
    notes = [
        f"{config.target:.0%} of the {config.target_of}'s {config.target_unit} remain at most; FFN widths in steps of {unit}; "
        + ("every layer alike" if config.settle.scope == "uniform" else "layers may differ")
    ]
    refusal = attention_refusal(row)
    if refusal and config.gates.attention != "none":
        notes.append(f"gates.attention falls back to none: {refusal}")
    elif config.gates.attention != "none" and config.learned:
        notes.append("how attention and FFN share the cut is learned: the counts above are if both give alike")
    if width % 256:
        notes.append(f"FFN width {width} is no multiple of 256: llama.cpp's K-quants fall back to larger types there")
    if scores:
        notes.append(
            f"attention scores cost {scores * shape.layers:,} FLOPs less per attended token, not counted above"
        )
    if config.baseline:
        notes.append(f"baseline {config.baseline}: a rival's choice in place of learned gates")
    return tuple(notes)
