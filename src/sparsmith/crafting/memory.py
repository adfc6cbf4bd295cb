"""Memory and disk of a run, from counts alone.

Weights, gradients and optimiser state are exact products. Activations depend on how long the rows are, so they come as low, expected
and high: a micro-batch whose rows fill a quarter, half and all of `max_length`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsmith.anatomy import ModelShape
    from sparsmith.methods.base import LoraSettings

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# NF4 with double quantisation: 4 bits, an 8-bit scale per 64 weights, a 32-bit scale per 256 of those: 4 + 8/64 + 32/(64*256) bits
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Bytes of optimiser state per trained parameter (float32 masters); unknown names count as two float32 moments
OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "adamw_bnb_8bit": 2, "adafactor": 0.1, "sgd": 0}
LENGTH_SHARE = {"low": 0.25, "expected": 0.5, "high": 1.0}


@dataclass(frozen=True)
class Memory:
    """Bytes while tuning, on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: dict[str, int]

    def total(self, case: str = "expected") -> int:
        """Bytes in the case `low`, `expected` or `high`."""
        return self.weights + self.gradients + self.optimizer + self.activations[case]

    def as_dict(self) -> dict:
        return {**asdict(self), "total": {case: self.total(case) for case in LENGTH_SHARE}}


def weight_bytes(shape: ModelShape, added: int, dtype: str, quant: str) -> int:
    """Base in its number type (NF4: the blocks' linears at 4.13 bits), added tensors in float32."""
    width = BYTES[dtype]
    if quant == "none":
        return round(shape.total_params * width + added * 4)
    linear = quantised_weights(shape)
    return round(linear * NF4_BYTES + (shape.total_params - linear) * width + added * 4)


def quantised_weights(shape: ModelShape) -> int:
    """Weights that NF4 packs: those of the blocks' plain linears, a shared expert's among them. Experts, which are stacked in one tensor,
    stay as they are."""
    attention = sum(i * o for i, o in shape.attention_linears.values())
    shared = (
        sum(i * o for i, o in shape.sparse.shared_linears.values()) * len(shape.sparse.blocks) if shape.sparse else 0
    )
    dense = shape.dense_blocks * sum(i * o for i, o in shape.ffn_linears.values())
    return shape.layers * attention + dense + shared


def activation_bytes(
    shape: ModelShape, method_floats: int, *, tokens: int, width: float, lora: LoraSettings | None, checkpointing: bool
) -> int:
    """Bytes kept for the backward of one micro-batch, with a fused attention (which keeps no score matrix).

    Per block and token, in the model's number type: the two normed inputs of the linears, q, k, v and the attention's output, four tensors
    of the FFN's width, and of every LoRA its inner activation and, with dropout, its thinned input and mask; in float32: what the two norms
    keep (input and normed input). The head keeps its input, and float32 log-probabilities for the tokens that carry a label; half of the
    tokens are taken to. With checkpointing only the blocks' inputs stay, and one block at a time is computed again.
    """
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    low_rank: float = lora.r * len(shape.linears) if lora else 0
    if lora and lora.dropout > 0:
        low_rank += 1.25 * sum(inputs for inputs, _ in shape.linears.values())
    block = (2 * shape.hidden + attention + 4 * shape.ffn_width + low_rank) * width + 4 * shape.hidden * 4
    method = method_floats * width
    kept = shape.layers * block + method
    if (
        shape.sparse
    ):  # of a sparse block the FFN's four tensors are there once per expert taken, and the sorted inputs and outputs
        taken = 4 * shape.sparse.width * shape.sparse.top_k + 2 * shape.hidden * shape.sparse.top_k
        kept += len(shape.sparse.blocks) * (taken - 4 * shape.ffn_width) * width
    if checkpointing:
        kept = shape.layers * shape.hidden * width + block + method / max(shape.layers, 1)
    head = shape.head_width * 4 * 0.5 + 2 * shape.hidden * width
    return round(tokens * (kept + head))


def adapted_bytes(weights: int, blocks: int, dtype: str, checkpointing: bool) -> int:
    """Bytes of the sums of stacked experts and their LoRA: every sparse block keeps its own for the backward (with checkpointing one
    block at a time has it), and one block's gradient stands beside them. `weights`: of one block."""
    return round(((1 if checkpointing else blocks) + 1) * weights * BYTES[dtype]) if weights else 0


def optimizer_bytes(trained: int, optimizer: str) -> int:
    return round(trained * OPTIMIZER_BYTES.get(optimizer, 8))
