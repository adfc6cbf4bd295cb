"""What of a model is a mixture of experts, from its config alone: which blocks, how many experts, how wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sparsmith.anatomy.rows import Anatomy, base_config, of
from sparsmith.errors import UnsupportedAnatomy

MEAN_TAKEN = "mean_experts_per_token"
"""Of a config: experts that a token takes on average, where that is no fixed number."""


@dataclass(frozen=True)
class SparseShape:
    """The experts of a model. Each is an FFN of its own: 3 d w weights where it is gated."""

    blocks: tuple[int, ...]
    """Indices of the blocks whose FFN is a mixture. Of an encoder-decoder the encoder's blocks are counted first."""
    hidden: int
    """d."""
    experts: int
    """E, in each of these blocks."""
    top_k: float
    """Experts that one token takes; on average, where experts choose tokens."""
    width: int
    """w, inner width of an expert."""
    shared: int | None
    """Inner width of the expert that every token takes beside them; 0: it is there and empty; None: the family has none."""
    matrices: int = 3
    """Weight matrices of an expert: 3 where it is gated, 2 where it is plain."""
    router_bias: bool = False

    @property
    def expert_params(self) -> int:
        return len(self.blocks) * self.experts * self.matrices * self.hidden * self.width

    @property
    def stacked(self) -> dict[str, tuple[int, int]]:
        """Name of a stacked tensor in the module of the experts -> (inputs, outputs) of each expert's slice, which lies as
        (outputs, inputs)."""
        return {"gate_up_proj": (self.hidden, 2 * self.width), "down_proj": (self.width, self.hidden)}

    @property
    def shared_linears(self) -> dict[str, tuple[int, int]]:
        """Name of a linear of the shared expert -> (inputs, outputs); nothing where it is empty."""
        if not self.shared:
            return {}
        inward = (self.hidden, self.shared)
        return {"gate_proj": inward, "up_proj": inward, "down_proj": (self.shared, self.hidden)}

    @property
    def router_params(self) -> int:
        return len(self.blocks) * self.experts * (self.hidden + self.router_bias)

    @property
    def shared_params(self) -> int:
        """The shared expert and its gate."""
        return 0 if self.shared is None else len(self.blocks) * self.hidden * (3 * self.shared + 1)

    @property
    def total_params(self) -> int:
        return self.expert_params + self.router_params + self.shared_params

    @property
    def inactive_params(self) -> int:
        """Parameters of the experts that one token does not take."""
        return round(self.expert_params // self.experts * (self.experts - self.top_k))

    @property
    def active_params(self) -> int:
        return self.total_params - self.inactive_params


def sparse_shape(config: Any) -> SparseShape | None:
    """The experts of a config's model; None of a dense one."""
    config = base_config(config)
    row = of(config)
    if not row.experts:
        return None
    if row.encoder_blocks:
        return _of_two_stacks(config)
    layers, listed = config.num_hidden_layers, set(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", None) or 1
    blocks = tuple(index for index in range(layers) if index not in listed and (index + 1) % step == 0)
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return SparseShape(
        blocks=blocks if experts else (),
        hidden=config.hidden_size,
        experts=experts,
        top_k=getattr(config, MEAN_TAKEN, None) or config.num_experts_per_tok,
        width=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        shared=getattr(config, "shared_expert_intermediate_size", None) if row.shared_expert else None,
    )


def _of_two_stacks(config: Any) -> SparseShape:
    """Of an encoder-decoder. In a stack every n-th block is sparse, from the second on, as its step n says; with 1 all are, and with 0
    none. (A config that asks for none gets as step the number of blocks, and so one sparse block: the library builds it too.)"""

    def sparse(step: int, at: int) -> bool:
        return step > 0 and (step == 1 or at % step == 1)

    encoder, decoder = config.num_layers, config.num_decoder_layers
    blocks = [at for at in range(encoder) if sparse(config.encoder_sparse_step, at)]
    blocks += [encoder + at for at in range(decoder) if sparse(config.decoder_sparse_step, at)]
    return SparseShape(
        blocks=tuple(blocks),
        hidden=config.d_model,
        experts=config.num_experts,
        top_k=1,
        width=config.d_ff,
        shared=None,
        matrices=2,
        router_bias=config.router_bias,
    )


def idle_biases(config: Any, row: Anatomy, attention: Mapping[str, Any]) -> tuple[str, ...]:
    """Linears of a block whose bias is zero and never trains: of a mixture that was made from a model without biases, in an architecture
    that has them (`upcycled_from` in its config says so).

    Args:
        attention: the block's attention linears, the one outward last.
    """
    donor = getattr(config, "upcycled_from", None)
    if row.attention_bias != "qkv_config" or donor is None:
        return ()
    return () if of(SimpleNamespace(model_type=donor)).attention_bias == "qkv" else tuple(attention)[:-1]


def is_sparse(config: Any) -> bool:
    """True for a model with experts in some block, of a family that has a row."""
    try:
        found = sparse_shape(config)
        return found is not None and bool(found.blocks)
    except UnsupportedAnatomy:  # told where an anatomy is needed; a plug-in may know the family
        return False


def refuse_sparse(config: Any, who: str) -> None:
    """A method that shapes dense models must not be handed a mixture.

    Raises:
        UnsupportedAnatomy.
    """
    if is_sparse(config):
        inner = base_config(config)
        raise UnsupportedAnatomy(
            f"{who} on {type(inner).__name__} (model_type {inner.model_type})",
            "a mixture of experts already",
            "a dense model",
            "Start from the dense model of this family, or tune this one by {method: upcycle, donor: sparse}.",
        )
