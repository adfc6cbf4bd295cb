"""How the experts run while they train: transformers' functions, and in place of its grouped products on a CPU one of ours, which stands in
the library's own table. Evaluation, settling and exports use the library's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsmith.ops.gated_experts import gated_experts

GROUPED = "sparsmith_grouped"
"""Our name in the library's table; never written to a file."""


def implementation(asked: str) -> str:
    """The name in transformers' table of what `moe.experts_impl` asks for."""
    if asked != "grouped_mm":
        return asked
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped)
    return GROUPED


def grouped(experts: Any, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """(T, D), with the signature of the table's functions."""
    if serves(experts, hidden_TD):
        return gated_experts(hidden_TD, experts.gate_up_proj, experts.down_proj, indices_TK, weights_TK)
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(experts, hidden_TD, indices_TK, weights_TK)


def serves(experts: Any, hidden_TD: Tensor) -> bool:
    """Whether ours is the same function: plain SiLU-gated experts, on a CPU, in training, in one number type."""
    from transformers.activations import SiLUActivation
    from transformers.integrations import moe

    plain_gate = getattr(
        moe, "_default_apply_gate", None
    )  # a private name: where it is gone, the library's function runs
    return (
        experts.training
        and hidden_TD.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and experts.has_gate
        and experts.is_concatenated
        and not (experts.has_bias or experts.is_transposed)
        and not (getattr(experts, "has_post_expert_norm", False) or getattr(experts, "_is_expert_parallel", False))
        and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))
        and type(experts)._apply_gate is plain_gate  # not where dropout stands behind the activation
        and experts.gate_up_proj.dtype == experts.down_proj.dtype == hidden_TD.dtype
    )
