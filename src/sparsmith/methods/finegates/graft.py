"""Put the gates into a model: which linears and norms are wrapped, by what the family allows."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsmith import anatomy
from sparsmith.anatomy import Anatomy, ModelShape
from sparsmith.errors import MethodError
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.families import attention_gates
from sparsmith.methods.finegates.gates import Gate, GatedAttention, GatedFFN, GatedNorm, GateState, gates_of
from sparsmith.methods.finegates.places import places_of


def graft(model: nn.Module, config: FineGatesConfig, seed: int) -> None:
    """Structured gates around the last linears of FFN and attention, in place; the function stays the same to the bit."""
    if gates_of(model):
        raise MethodError("finegates", "a model with gates already", "a model without", "Settle it first.")
    row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model)
    heads = attention_gates(config, row)
    for block in anatomy.blocks(model):
        if config.gates.ffn or config.gates.blocks:
            _gate_ffn(block, row, shape, config)
        if heads != "none" or config.gates.blocks:
            _gate_attention(block, row, shape, config, heads)
    base: Any = anatomy.base_of(model)
    base.finegates = GateState(seed, next(model.parameters()).device)


def _gate_ffn(block: nn.Module, row: Anatomy, shape: ModelShape, config: FineGatesConfig) -> None:
    ffn, name = places_of(block, row, "ffn")[-1]
    linear = getattr(ffn, name)
    device = next(linear.parameters()).device
    gated = GatedFFN(linear, name, shape.ffn_width, device)
    if config.gates.ffn:
        gated.units = Gate(shape.ffn_width, config.gates.init_mu, device)
    _gate_block(block, row.ffn_out_norm, gated, config)
    gated.train(linear.training)
    setattr(ffn, name, gated)


def _gate_attention(block: nn.Module, row: Anatomy, shape: ModelShape, config: FineGatesConfig, heads: str) -> None:
    attention, name = places_of(block, row, "attention")[-1]
    linear = getattr(attention, name)
    device = next(linear.parameters()).device
    gated = GatedAttention(linear, name, shape.heads * shape.head_dim, device)
    gated.head_dim = shape.head_dim
    if heads != "none":
        gated.groups = Gate(shape.kv_heads, config.gates.init_mu, device)
    if heads == "kv_groups+q_heads":
        gated.heads = Gate(shape.heads, config.gates.init_mu, device)
    _gate_block(block, row.attention_out_norm, gated, config)
    gated.train(linear.training)
    setattr(attention, name, gated)


def _gate_block(block: nn.Module, norm_name: str, gated: nn.Module, config: FineGatesConfig) -> None:
    """The sub-block's gate: on the linear, or on the norm between it and the residual stream."""
    if not config.gates.blocks:
        return
    device = next(gated.parameters()).device
    holder: Any = gated
    if norm_name:
        holder = GatedNorm(getattr(block, norm_name))
        holder.train(block.training)
        setattr(block, norm_name, holder)
    holder.block = Gate(1, config.gates.init_mu, device)
