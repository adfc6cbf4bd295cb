"""The mixture in memory: an object of the stock class that shares with the donor every tensor that is only carried over."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.methods.upcycle.convert import converted
from sparsmith.methods.upcycle.targets import sparse_config


def build_sparse(model: Any, config: UpcycleConfig, seed: int) -> Any:
    """The mixture of a dense model, on its device and in its number type and mode. The donor's object is used up.

    Raises:
        RefusedDonor.
    """
    made = sparse_config(model.config, config)
    sparse = _empty(made, next(model.parameters()))
    state = converted(_state(model), model.config, made, config, seed)
    if getattr(made, "tie_word_embeddings", False):
        head = f"{anatomy.of(made).head}.weight"
        state[head] = state.get(head, state[f"{anatomy.of(made).embeddings}.weight"])
    sparse.load_state_dict(state, strict=True, assign=True)
    sparse.tie_weights()
    sparse.generation_config = copy.deepcopy(model.generation_config)
    made._name_or_path = getattr(model.config, "_name_or_path", "")
    return sparse.train(model.training)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _empty(made: Any, like: torch.Tensor) -> Any:
    """A model of the config whose weights are yet to come; its buffers are real."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(like.device), no_init_weights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # an empty shared expert
        return AutoModelForCausalLM.from_config(made, dtype=like.dtype, attn_implementation=made._attn_implementation)
