"""What a model allows: which gates can be cut away exactly, what each costs, and what a checkpoint of the family may look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsmith.methods.finegates.config import FineGatesConfig

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape


def attention_refusal(row: Anatomy) -> str:
    """Why heads cannot be deleted in this family; empty where they can."""
    if row.qk_norm == "full":
        return "the norm on queries and keys spans all heads"
    if row.head_counts == "fixed":
        return "the head size is hidden size / heads in this family's config"
    return ""


def attention_gates(config: FineGatesConfig, row: Anatomy) -> str:
    """`none`, `kv_groups` or `kv_groups+q_heads`, as built."""
    return "none" if attention_refusal(row) else config.gates.attention


def kept_groups_allowed(row: Anatomy, shape: ModelShape) -> tuple[int, ...]:
    """Key-value groups that a stock checkpoint may keep, ascending, all query heads of a group kept with it.

    Llama's own class wants a head count that divides the hidden size; a Llama without biases is a Mistral, whose class wants nothing.
    """
    per_group = shape.heads // shape.kv_heads
    counts = range(1, shape.kv_heads + 1)
    if row.head_counts == "divides" and not becomes_mistral(shape):
        return tuple(g for g in counts if shape.hidden % (g * per_group) == 0)
    return tuple(counts)


def becomes_mistral(shape: ModelShape) -> bool:
    """True for a model that Mistral's class computes to the bit: a Llama without biases."""
    return shape.model_type == "llama" and not shape.biases


@dataclass(frozen=True)
class Costs:
    """Of one unit of each kind, in parameters or in FLOPs per token; `base` is what the target is a share of."""

    unit: float
    """An FFN channel: its row in each inward linear (with bias) and its column outward."""
    group: float
    """A key-value group without its query heads."""
    head: float
    """A query head: its rows in q and its columns in o."""
    base: float
    fixed: float
    """Part of `base` that no gate can close."""

    @classmethod
    def of(cls, config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> Costs:
        inward = 2 if shape.ffn_kind in ("gated", "fused_gated") else 1
        biased = {name.rsplit(".", 1)[-1]: name in shape.biases for name in shape.linears}
        unit = (inward + 1) * shape.hidden + sum(inward_biases(row, biased, inward))
        qkv_bias = biased.get(row.attention_linears[0], False)
        group = 2 * shape.head_dim * (shape.hidden + qkv_bias)
        head = 2 * shape.head_dim * shape.hidden + shape.head_dim * qkv_bias
        body = shape.attention_params + shape.ffn_params
        if config.target_unit == "flops":
            unit, group, head = 2 * unit, 2 * group, 2 * head + 4 * shape.head_dim * config.flops_context
            body = 2 * body + 4 * shape.layers * shape.heads * shape.head_dim * config.flops_context
        rest = shape.total_params - shape.attention_params - shape.ffn_params
        if config.target_unit == "flops":
            rest = 2 * shape.vocab * shape.hidden
        base = body + (rest if config.target_of == "total" else 0)
        gated = shape.layers * (shape.ffn_width * unit if config.gates.ffn else 0)
        if attention_gates(config, row) != "none":
            gated += shape.layers * (shape.kv_heads * group + shape.heads * head)
        if config.gates.blocks:
            gated = body
        return cls(unit, group, head, base, base - gated)

    def attention(self, groups: int, heads: int) -> float:
        """One block's attention with so many groups and query heads in all."""
        return groups * self.group + heads * self.head


def inward_biases(row: Anatomy, biased: dict[str, bool], inward: int) -> list[int]:
    """Biases of one FFN channel, one for each inward linear."""
    names = row.ffn_linears[:-1]
    fused = inward // max(1, len(names))
    return [fused * biased.get(name, False) for name in names]


def unit_of(config: FineGatesConfig, width: int) -> int:
    """FFN widths are multiples of this."""
    if config.settle.unit != "auto":
        return config.settle.unit
    if width >= 4096:
        return 256
    return max(1, 1 << max(0, (width // 16).bit_length() - 1))


def as_mistral_config(config: Any) -> Any:
    """The sizes of a Llama in Mistral's config."""
    from transformers import MistralConfig

    values = {**config.to_dict(), "sliding_window": None}
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version"):
        values.pop(name, None)
    return MistralConfig(**values)
