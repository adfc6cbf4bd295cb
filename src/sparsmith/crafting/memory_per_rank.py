"""Memory of one rank when several GPUs share the work, from counts alone. Bytes; N ranks.

    DDP     every rank holds everything; with N > 1 the gradients twice, because DDP sums them in buckets of their own:
                weights W, gradients 4T (8T), optimizer O
    FSDP2   every rank holds 1/N of weights, gradients and state, and gathers what it computes with: two blocks at a time (the one
            at work and the next), the gradients of one block before they are summed, and the head:
                weights W/N + 2 W_block + W_head, gradients 4T/N + 4T/L, optimizer O/N
            accelerate does not cut an NF4 base: its 4-bit tensors stay whole on each rank, and only the rest of W is divided.
            One rank shards nothing.
    QLoRA   DDP over a base whose linears are in NF4

W: base in its number type and trained tensors in float32; T: trained parameters; O: optimiser state; L: blocks; W_block: the blocks'
weights and trained tensors over L. Activations are those of a rank's own micro-batch, with rows half as long as `max_length` (see
`memory.py`); they fall with N where the batch is shared out further. Not counted: the CUDA context and the kernels' workspace (1 to 2 GB),
and what the allocator wastes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sparsmith.crafting.memory import (
    BYTES,
    LENGTH_SHARE,
    NF4_BYTES,
    activation_bytes,
    adapted_bytes,
    quantised_weights,
    weight_bytes,
)

if TYPE_CHECKING:
    from sparsmith.anatomy import ModelShape
    from sparsmith.methods.base import LoraSettings

RANKS = (1, 8, 64)
LAYOUTS = ("ddp", "fsdp2", "qlora")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank while tuning."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the ranks share."""

    shape: ModelShape
    added: int
    """Parameters that crafting adds, LoRA included; float32."""
    trained: int
    optimizer: int
    """Bytes of the optimiser's state."""
    dtype: str
    quant: str
    activation_floats: int
    """What the methods keep for the backward, per token."""
    lora: LoraSettings | None
    checkpointing: bool
    max_length: int
    batch_size: int
    micro_batch: int
    """Largest number of rows per forward."""
    adapted_weights: int = 0
    """Of one sparse block: the stacked weights that a LoRA changes, which every forward computes anew."""
    adapted_blocks: int = 0

    @property
    def adapted_bytes(self) -> int:
        """Of the sums of stacked experts and their LoRA, while a step runs."""
        return adapted_bytes(self.adapted_weights, self.adapted_blocks, self.dtype, self.checkpointing)

    def rows(self, ranks: int) -> int:
        """Rows per forward of one rank."""
        return max(1, min(self.micro_batch, self.batch_size // ranks))

    def activations(self, rows: int, quant: str, share: float = LENGTH_SHARE["expected"]) -> int:
        """Bytes for a forward of that many rows, filled to `share` of `max_length`."""
        return self.adapted_bytes + activation_bytes(
            self.shape,
            self.activation_floats,
            tokens=round(rows * self.max_length * share),
            width=2.0 if quant != "none" else BYTES[self.dtype],
            lora=self.lora,
            checkpointing=self.checkpointing,
        )


def memory_per_rank(load: Load) -> dict[str, dict[int, RankMemory]]:
    """Layout -> number of ranks -> bytes on each."""
    by_layout = {"ddp": _ddp, "fsdp2": _fsdp2, "qlora": _qlora}
    return {layout: {ranks: by_layout[layout](load, ranks) for ranks in RANKS} for layout in LAYOUTS}


def sharded_weights(load: Load, ranks: int) -> int:
    """What a rank holds of the weights between two steps under FSDP2."""
    whole, cut = _weights(load)
    return round(whole + cut / ranks)


def _ddp(load: Load, ranks: int, quant: str | None = None) -> RankMemory:
    quant = quant or load.quant
    return RankMemory(
        weights=weight_bytes(load.shape, load.added, load.dtype, quant),
        gradients=4 * load.trained * (2 if ranks > 1 else 1),
        optimizer=load.optimizer,
        activations=load.activations(load.rows(ranks), quant),
    )


def _qlora(load: Load, ranks: int) -> RankMemory:
    return _ddp(load, ranks, "nf4")


def _fsdp2(load: Load, ranks: int) -> RankMemory:
    if ranks == 1:
        return _ddp(load, ranks)
    shape, width = load.shape, BYTES[load.dtype]
    linears = 0 if load.quant != "none" else shape.attention_params + shape.ffn_params
    linears += shape.sparse.total_params if shape.sparse else 0
    block = ((linears + shape.norm_params) * width + 4 * load.added) / shape.layers
    head = shape.head_width * shape.hidden * width
    return RankMemory(
        weights=round(sharded_weights(load, ranks) + 2 * block + head),
        gradients=round(4 * load.trained / ranks + 4 * load.trained / shape.layers),
        optimizer=round(load.optimizer / ranks),
        activations=load.activations(load.rows(ranks), load.quant),
    )


def _weights(load: Load) -> tuple[float, float]:
    """(bytes that no layout cuts, bytes that FSDP2 cuts)."""
    everything = weight_bytes(load.shape, load.added, load.dtype, load.quant)
    if load.quant == "none":
        return 0.0, everything
    linear = quantised_weights(load.shape) * NF4_BYTES
    return linear, everything - linear
