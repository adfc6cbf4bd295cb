"""Fold and delete: scales go into the weights, closed rows and columns go away, and what is left is a plain model of smaller shape.

Runs after a LoRA has been merged, so every weight is plain. Biases: an inward linear's is cut with its rows; an outward linear's stays,
because it does not pass through a unit.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy, views
from sparsmith.errors import LayoutMismatch
from sparsmith.methods.finegates.families import becomes_mistral
from sparsmith.methods.finegates.gates import Gate, GatedLinear, GatedNorm, Site, sites


def fold_and_cut(model: Any) -> Any:
    """The settled model without gates, in place where its class stays; a new object of Mistral's class where Llama's refuses the heads.

    Raises:
        LayoutMismatch: layers of unequal width, or a block of which only attention or only the FFN is closed.
    """
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model.config)
    blocks, modules = sites(model), list(anatomy.blocks(model))
    plans = [_Cut.of(site, shape) for site in blocks]
    keep = [index for index, cut in enumerate(plans) if cut.attention_open or cut.ffn_open]
    for index in keep:
        plans[index].apply(modules[index], blocks[index], row)
    widths = {(plans[i].width, plans[i].groups_left, plans[i].heads_left) for i in keep}
    lone = next((i for i in keep if not (plans[i].attention_open and plans[i].ffn_open)), None)
    if lone is not None or len(widths) != 1:
        raise LayoutMismatch(
            "finegates.settle",
            f"block {lone}, of which one half alone is closed" if lone is not None else "layers of unequal width",
            "one shape for all blocks",
            "Export as per-layer, or settle with scope uniform and gates.blocks false.",
        )
    width, groups, heads = next(iter(widths))
    base = anatomy.base_of(model)
    if len(keep) < len(modules):
        _drop_blocks(base, row, keep)
    _set_sizes(base, width, groups, heads, shape.head_dim)
    base._modules.pop("finegates", None)
    return _as_mistral(model) if needs_mistral(model, shape, heads) else model


class _Cut:
    """What stays of one block."""

    def __init__(self, site: Site, shape: anatomy.ModelShape) -> None:
        units, groups, heads = (site.gate(kind) for kind in ("units", "groups", "heads"))
        self.units = _indices(units, shape.ffn_width)
        self.groups = _indices(groups, shape.kv_heads)
        per_group = shape.heads // shape.kv_heads
        inside = [h for g in self.groups.tolist() for h in range(g * per_group, (g + 1) * per_group)]
        open_heads = set(_indices(heads, shape.heads).tolist())
        self.heads = torch.tensor([h for h in inside if h in open_heads], dtype=torch.long)
        self.attention_open = _is_open(site.gate("attention_block"))
        self.ffn_open = _is_open(site.gate("ffn_block"))
        self.head_dim, self.full = shape.head_dim, shape
        self.width, self.groups_left, self.heads_left = len(self.units), len(self.groups), len(self.heads)

    @classmethod
    def of(cls, site: Site, shape: anatomy.ModelShape) -> _Cut:
        return cls(site, shape)

    def apply(self, block: nn.Module, site: Site, row: Anatomy) -> None:
        if site.ffn is not None:
            scale = site.ffn.input_gate()
            linear = _unwrap(site.ffn, site.ffn_parent, row.ffn_linears[-1])
            _scale_out(linear, site.ffn._modules.get("block"))
            if scale is not None:
                self._cut_ffn(site.ffn_parent, linear, scale, row)
        if site.attention is not None:
            scale = site.attention.input_gate()
            linear = _unwrap(site.attention, site.attention_parent, row.attention_linears[-1])
            _scale_out(linear, site.attention._modules.get("block"))
            if scale is not None:
                self._cut_attention(site.attention_parent, linear, scale, row)
        for norm, name in ((site.ffn_norm, row.ffn_out_norm), (site.attention_norm, row.attention_out_norm)):
            if norm is not None:
                _release_norm(block, name, norm)

    def _cut_ffn(self, parent: Any, linear: nn.Module, scale: Tensor, row: Anatomy) -> None:
        units = self.units.to(scale.device)
        take_columns(linear, units, scale)
        full = self.full.ffn_width
        rows = torch.cat([units, units + full]) if row.ffn_kind == "fused_gated" else units
        for name in row.ffn_linears[:-1]:
            take_rows(getattr(parent, name), rows)
        if hasattr(parent, "intermediate_size"):
            parent.intermediate_size = len(units)

    def _cut_attention(self, parent: nn.Module, linear: nn.Module, scale: Tensor, row: Anatomy) -> None:
        h, shape = self.head_dim, self.full
        queries, keys = (_channels(part, h).to(scale.device) for part in (self.heads, self.groups))
        take_columns(linear, queries, scale)
        names = row.attention_linears[:-1]
        if len(names) == 1:
            first = shape.heads * h
            fused = torch.cat([queries, keys + first, keys + first + shape.kv_heads * h])
            take_rows(getattr(parent, names[0]), fused)
        else:
            for name, rows in zip(names, (queries, keys, keys)):
                take_rows(getattr(parent, name), rows)
        set_heads(parent, self.heads_left, self.groups_left)


def take_rows(linear: nn.Module, rows: Tensor) -> None:
    """Keep these outputs, with their biases."""
    part: Any = linear
    transposed = type(linear).__name__ == "Conv1D"
    part.weight = _plain(part.weight.index_select(1 if transposed else 0, rows))
    if part.bias is not None:
        part.bias = _plain(part.bias.index_select(0, rows))
    setattr(part, "nf" if transposed else "out_features", len(rows))


def take_columns(linear: nn.Module, columns: Tensor, scale_C: Tensor) -> None:
    """Keep these inputs, each multiplied by its scale; the product is made in float32 and rounded once."""
    part: Any = linear
    transposed = type(linear).__name__ == "Conv1D"
    axis = 0 if transposed else 1
    weight = part.weight.index_select(axis, columns)
    scale = scale_C.detach().index_select(0, columns)
    if not bool((scale == 1).all()):
        wide = torch.promote_types(weight.dtype, torch.float32)
        factor = scale.to(wide)[:, None] if transposed else scale.to(wide)[None]
        weight = (weight.to(wide) * factor).to(weight.dtype)
    part.weight = _plain(weight)
    setattr(part, "nx" if transposed else "in_features", len(columns))


def set_heads(attention: Any, heads: int, groups: int) -> None:
    """The counts that an attention module keeps as attributes, and those that it reads from its config."""
    for name, value in (
        ("num_heads", heads),
        ("num_key_value_heads", groups),
        ("num_key_value_groups", heads // groups),
    ):
        if hasattr(attention, name):
            setattr(attention, name, value)
    config = getattr(attention, "config", None)
    if config is not None and config.num_attention_heads != heads:
        attention.config = copy.copy(config)
        attention.config.__dict__.update(num_attention_heads=heads, num_key_value_heads=groups)


def needs_mistral(model: Any, shape: anatomy.ModelShape, heads: int) -> bool:
    """True where Llama's config would refuse the head count."""
    return becomes_mistral(shape) and heads != shape.heads and shape.hidden % heads != 0


def _plain(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _indices(gate: Gate | None, size: int) -> Tensor:
    return torch.arange(size) if gate is None else torch.nonzero(gate.kept.cpu()).flatten()


def _is_open(gate: Gate | None) -> bool:
    return gate is None or bool(gate.kept[0])


def _channels(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _unwrap(holder: GatedLinear, parent: nn.Module, name: str) -> nn.Module:
    linear = holder.linear
    setattr(parent, name, linear)
    return linear


@torch.no_grad()
def _scale_out(linear: nn.Module, gate: Any) -> None:
    """A sub-block's gate into its last linear, bias included."""
    if gate is None or bool((gate.folded() == 1).all()):
        return
    part: Any = linear
    for name in ("weight", "bias"):
        tensor = getattr(part, name, None)
        if tensor is not None:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            setattr(part, name, _plain((tensor.to(wide) * gate.folded().to(wide)).to(tensor.dtype)))


@torch.no_grad()
def _release_norm(block: nn.Module, name: str, gated: GatedNorm) -> None:
    """A sub-block's gate into the gain of the norm behind it; Gemma's gain is 1 + w."""
    norm: Any = gated.norm
    value = cast(Gate, gated.block).folded()
    if not bool((value == 1).all()):
        weight = norm.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        one = 1.0 if "Gemma" in type(norm).__name__ else 0.0
        norm.weight = _plain(((weight.to(wide) + one) * value.to(wide) - one).to(weight.dtype))
    setattr(block, name, norm)


def _set_sizes(base: Any, width: int, groups: int, heads: int, head_dim: int) -> None:
    """Into the config that every module of the model shares."""
    config = base.config
    field = "intermediate_size" if hasattr(config, "intermediate_size") else "n_inner"
    setattr(config, field, width)
    if heads != config.num_attention_heads:
        config.__dict__.update(num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim)
        for block in anatomy.blocks(base):
            attention: Any = anatomy.attention_of(block)
            if getattr(attention, "config", None) is not None:
                attention.config = config


def _drop_blocks(base: Any, row: Anatomy, keep: list[int]) -> None:
    """Leave closed blocks out; the rest are numbered anew, because caches go by the number."""
    cut = views.cut_config(base.config, keep)
    base.config.__dict__.update(cut.__dict__)
    modules = list(anatomy.blocks(base))
    parent, _, name = row.blocks.rpartition(".")
    setattr(anatomy.walk(base, parent), name, nn.ModuleList([modules[index] for index in keep]))
    for number, index in enumerate(keep):
        for part in modules[index].modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = number  # type: ignore[assignment]


def _as_mistral(model: Any) -> Any:
    """The same tensors in Mistral's class, which takes any number of heads."""
    from transformers import MistralConfig, MistralForCausalLM, MistralForSequenceClassification

    values = {**model.config.to_dict(), "sliding_window": None}
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version"):
        values.pop(name, None)
    kind: Any = MistralForSequenceClassification if hasattr(model, "score") else MistralForCausalLM
    config = MistralConfig(**values)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        other = kind(config)
    other.load_state_dict(model.state_dict(), assign=True, strict=True)
    other.tie_weights()
    for name, buffer in model.named_buffers():  # rotary tables are no part of the state
        if name not in model.state_dict():
            parent, _, last = name.rpartition(".")
            other.get_submodule(parent)._buffers[last] = buffer
    other.generation_config = getattr(model, "generation_config", None)
    other.config.architectures = [kind.__name__]
    other.requires_grad_(False)
    return other.train(model.training)
