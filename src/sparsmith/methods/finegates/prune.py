"""Fold and delete: scales go into the weights, closed rows and columns go away (or become zero), and no gate is left.

Runs after a LoRA has been merged, so every weight is plain. Biases: an inward linear's is cut with its rows; an outward linear's stays,
because it does not pass through a unit. What each form holds is worked out in `forms.py`, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy, ModelShape, views
from sparsmith.methods.finegates.families import as_mistral_config, becomes_mistral
from sparsmith.methods.finegates.forms import Part, layout_of
from sparsmith.methods.finegates.gates import Gate, GatedLinear, GatedNorm, Site, sites
from sparsmith.methods.finegates.modeling import SparsmithSlimConfig, SparsmithSlimForCausalLM, set_heads
from sparsmith.methods.finegates.places import Place


@torch.no_grad()
def fold_and_cut(model: Any, form: str = "auto") -> Any:
    """The settled model without gates, in place where its class stays; a new object of Mistral's class where Llama's refuses the heads, and
    of ours where blocks differ.

    Args:
        form: as `forms.py` tells them.

    Raises:
        LayoutMismatch: a form that the model cannot take; it is left as it was.
    """
    layout = layout_of(model, form)
    row, shape, base = anatomy.anatomy_of(model), anatomy.shape_of(model), anatomy.base_of(model)
    for site, block, kept, present in zip(sites(model), anatomy.blocks(model), layout.open, layout.present):
        if present is not None:
            _Cut(kept, present, shape, row).apply(block, site)
    base._modules.pop("finegates", None)
    if layout.form == "zeros":
        return model
    if len(layout.kept_blocks) < shape.layers:
        _drop_blocks(base, row, layout.kept_blocks)
    parts = [part for part in layout.present if part is not None]
    if layout.form == "per-layer":
        return _as_slim(base, row, shape, parts)
    heads, groups = len(parts[0].heads), len(parts[0].groups)
    _set_sizes(base, len(parts[0].units), groups, heads, shape.head_dim)
    return _as_mistral(model) if needs_mistral(shape, heads) else model


def is_slim(model: nn.Module) -> bool:
    """True for a model whose blocks differ."""
    return isinstance(model, SparsmithSlimForCausalLM)


class _Cut:
    """From what is open in one block to what its files hold."""

    def __init__(self, kept: Part, present: Part, shape: ModelShape, row: Anatomy) -> None:
        self.kept, self.present, self.shape, self.row = kept, present, shape, row

    def apply(self, block: nn.Module, site: Site) -> None:
        row = self.row
        if site.ffn is not None:
            scale = site.ffn.input_gate()
            linear = _unwrap(site.ffn, *site.ffn_places[-1])
            _scale_out(linear, site.ffn._modules.get("block"))
            if scale is not None:
                self._cut_ffn(site.ffn_places, linear, scale)
        if site.attention is not None:
            scale = site.attention.input_gate()
            linear = _unwrap(site.attention, *site.attention_places[-1])
            _scale_out(linear, site.attention._modules.get("block"))
            if scale is not None:
                self._cut_attention(site.attention_places, linear, scale)
        for norm, name in ((site.ffn_norm, row.ffn_out_norm), (site.attention_norm, row.attention_out_norm)):
            if norm is not None:
                _release_norm(block, name, norm)

    def _cut_ffn(self, places: tuple[Place, ...], linear: nn.Module, scale: Tensor) -> None:
        units, device = self.present.units, scale.device
        open_units = set(self.kept.units) if self.kept.ffn else set()
        take_columns(linear, _index(units, device), scale)
        times = 2 if self.row.ffn_kind == "fused_gated" else 1
        rows = [unit + part * self.shape.ffn_width for part in range(times) for unit in units]
        closed = [place for place, unit in enumerate(units * times) if unit not in open_units]
        for holder, name in places[:-1]:
            take_rows(getattr(holder, name), _index(rows, device), _index(closed, device))
        parent: Any = places[-1][0]
        if hasattr(parent, "intermediate_size"):
            parent.intermediate_size = len(units)

    def _cut_attention(self, places: tuple[Place, ...], linear: nn.Module, scale: Tensor) -> None:
        h, shape, device = self.shape.head_dim, self.shape, scale.device
        on = self.kept.attention
        queries = _channels(self.present.heads, h)
        take_columns(linear, _index(queries, device), scale)
        keys = _channels(self.present.groups, h)
        no_queries = _closed(self.present.heads, self.kept.heads if on else (), h)
        no_keys = _closed(self.present.groups, self.kept.groups if on else (), h)
        inward = [getattr(holder, name) for holder, name in places[:-1]]
        if len(inward) == 1:
            first, second = shape.heads * h, (shape.heads + shape.kv_heads) * h
            rows = [*queries, *(k + first for k in keys), *(k + second for k in keys)]
            closed = [
                *no_queries,
                *(k + len(queries) for k in no_keys),
                *(k + len(queries) + len(keys) for k in no_keys),
            ]
            take_rows(inward[0], _index(rows, device), _index(closed, device))
        else:
            for linear, rows, closed in zip(inward, (queries, keys, keys), (no_queries, no_keys, no_keys)):
                take_rows(linear, _index(rows, device), _index(closed, device))
        set_heads(places[-1][0], len(self.present.heads), len(self.present.groups))


def take_rows(linear: nn.Module, rows: Tensor, closed: Tensor) -> None:
    """Keep these outputs, with their biases; of them, those at the places `closed` become zero."""
    part: Any = linear
    transposed = type(linear).__name__ == "Conv1D"
    axis = 1 if transposed else 0
    part.weight = _plain(part.weight.index_select(axis, rows).index_fill(axis, closed, 0.0))
    if part.bias is not None:
        part.bias = _plain(part.bias.index_select(0, rows).index_fill(0, closed, 0.0))
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


def needs_mistral(shape: ModelShape, heads: int) -> bool:
    """True where Llama's config would refuse the head count."""
    return becomes_mistral(shape) and heads != shape.heads and shape.hidden % heads != 0


def _plain(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _index(values: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long, device=device)


def _channels(heads: Iterable[int], head_dim: int) -> list[int]:
    return [head * head_dim + channel for head in heads for channel in range(head_dim)]


def _closed(present: Iterable[int], kept: Iterable[int], head_dim: int) -> list[int]:
    """Places, among the channels of `present`, of those that are not kept."""
    held = set(kept)
    return _channels([place for place, head in enumerate(present) if head not in held], head_dim)


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
    setattr(config, _width_field(config), width)
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


def _as_slim(base: Any, row: Anatomy, shape: ModelShape, parts: list[Part]) -> SparsmithSlimForCausalLM:
    """The narrowed base in our own class. Its config keeps the head counts of old, which the family's class has checks for, and the width
    of the widest FFN."""
    widths = [len(part.units) for part in parts if part.ffn]
    setattr(base.config, _width_field(base.config), max(widths, default=shape.ffn_width))
    layers = [
        {
            "intermediate_size": len(part.units) * part.ffn,
            "num_attention_heads": len(part.heads) * part.attention,
            "num_key_value_heads": len(part.groups) * part.attention,
            "attention": part.attention,
            "ffn": part.ffn,
        }
        for part in parts
    ]
    slim = {
        "blocks": row.blocks,
        "attention": row.attention,
        "ffn": row.ffn,
        "attention_linears": list(row.attention_linears),
        "ffn_linears": list(row.ffn_linears),
        "fused": row.ffn_kind == "fused_gated",
        "head_dim": shape.head_dim,
        "per_layer_config": layers,
    }
    config = SparsmithSlimConfig(base_config=base.config, slim=slim, dtype=base.dtype)
    model = SparsmithSlimForCausalLM(config, base)
    model.requires_grad_(False)
    return model.train(base.training)


def _width_field(config: Any) -> str:
    return "intermediate_size" if hasattr(config, "intermediate_size") else "n_inner"


def _as_mistral(model: Any) -> Any:
    """The same tensors in Mistral's class, which takes any number of heads; of a wrapper, its base."""
    base = anatomy.base_of(model)
    if base is model:
        return _mistral_of(model)
    model.base = _mistral_of(base)
    model.config.base_config = model.base.config
    return model


def _mistral_of(model: Any) -> Any:
    from transformers import MistralForCausalLM, MistralForSequenceClassification

    kind: Any = MistralForSequenceClassification if hasattr(model, "score") else MistralForCausalLM
    config = as_mistral_config(model.config)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        other = kind(config)
    for ours, theirs in zip(anatomy.blocks(other), anatomy.blocks(model)):  # an FFN may be wrapped by another method
        anatomy.set_ffn(ours, anatomy.ffn_of(theirs))
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(other.model, name, getattr(model.model, name))
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
