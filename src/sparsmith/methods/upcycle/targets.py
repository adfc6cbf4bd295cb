"""Which stock mixture holds a dense model's function exactly, and the config that makes it so.

Every choice is made from the config alone. Spec 4.1: the combine weights sum to 1, the copies are identical, nothing is dropped, and
attention, norms and positions are the donor's own; then the logits at step 0 are the donor's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from sparsmith import anatomy
from sparsmith.anatomy.experts import MEAN_TAKEN
from sparsmith.anatomy.rows import base_config
from sparsmith.errors import RefusedDonor
from sparsmith.methods.upcycle.config import UpcycleConfig

TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral", "qwen2_moe"),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
    "olmo2": ("flex_olmo",),
}
"""Donor -> the architectures that can hold it, the preferred first."""
_PESC = (
    "Take the method `pesc`, whose experts stand on any of these families, or a donor of: " + ", ".join(TARGETS) + "."
)
_WHY = {
    "gemma2": "norms around its blocks and a GeLU gate, which no stock mixture has",
    "gemma3_text": "norms around its blocks and a GeLU gate, which no stock mixture has",
    "phi3": "fused projections and partial rotary positions, for which no target was proven",
    "gpt_neox": "LayerNorm and biases, which no stock mixture has",
    "gpt2": "LayerNorm, biases and learned positions, which no stock mixture has",
    "bert": "an encoder, which writes no text",
    "roberta": "an encoder, which writes no text",
}
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# layers that only some architectures can leave dense
_ANY_LAYERS = ("qwen2_moe", "qwen3_moe")
_RAW_WEIGHTS = ("qwen2_moe", "qwen3_moe", "flex_olmo")  # those whose config can say `norm_topk_prob: false`


def target_of(dense: Any, config: UpcycleConfig) -> str:
    """The architecture that comes out, as its `model_type`.

    Raises:
        RefusedDonor: tells what of the donor, or of the settings, no target can hold, and the alternative.
    """
    donor = str(base_config(dense).model_type)
    if donor not in TARGETS:
        row = anatomy.of(dense)  # an unknown family is told there
        if row.experts:
            raise RefusedDonor(
                f"upcycle on {donor}",
                "a mixture of experts already",
                "a dense model",
                "Tune it as it is: {method: upcycle, donor: sparse}.",
            )
        if row.encoder_blocks:
            raise RefusedDonor(
                f"upcycle on {donor}",
                "a dense encoder-decoder, of which no mixture is made here",
                "a decoder, or an encoder-decoder that was pre-trained sparse",
                "Take a SwitchTransformers checkpoint with donor: sparse, or tune this one whole with control: dense.",
            )
        raise RefusedDonor(
            f"upcycle on {donor}", _WHY.get(donor, "a family without a proven target"), "a known donor", _PESC
        )
    _check_donor(dense, donor)
    faults: dict[str, RefusedDonor] = {}
    for name in TARGETS[donor]:
        if config.target not in ("auto", name):
            continue
        fault = _fault(dense, donor, name, config)
        if fault is None:
            return name
        faults[name] = fault
    if not faults:
        raise RefusedDonor(
            "upcycle.target",
            f"`{config.target}` for a donor of the family {donor}",
            " or ".join(TARGETS[donor]),
            "Leave `target` out.",
        )
    raise next(iter(faults.values()))


def _check_donor(dense: Any, donor: str) -> None:
    """What no target of this donor can hold."""
    for name, what in (("mlp_bias", "biases in its FFNs"),):
        if getattr(dense, name, False):
            raise RefusedDonor(f"upcycle on {donor}: {name}", what, "a donor without", _PESC)
    if donor == "llama" and getattr(dense, "attention_bias", False):
        found = "biases in its attention, the output's among them"
        raise RefusedDonor(f"upcycle on {donor}: attention_bias", found, "a donor without", _PESC)
    if getattr(dense, "quantization_config", None) is not None:
        raise RefusedDonor(
            f"upcycle on {donor}: quantization_config",
            "a quantised donor, whose copies would be of rounded weights",
            "the plain weights",
            "Take the checkpoint before it was quantised.",
        )
    slides = getattr(dense, "use_sliding_window", False) or any(
        kind != "full_attention" for kind in getattr(dense, "layer_types", None) or ()
    )
    if donor in ("qwen2", "qwen3") and slides:
        found = "sliding windows in some of its blocks, which the target places elsewhere"
        raise RefusedDonor(f"upcycle on {donor}: use_sliding_window", found, "full attention", _PESC)


def _fault(dense: Any, donor: str, target: str, config: UpcycleConfig) -> RefusedDonor | None:
    """Why this target cannot hold the donor under these settings."""
    where = f"upcycle on {donor} to {target}"
    if target not in _ANY_LAYERS and len(config.block_indices(dense.num_hidden_layers)) < dense.num_hidden_layers:
        return RefusedDonor(
            f"{where}: layers",
            f"`{config.layers}`",
            "all, as every block of this target is sparse",
            _other(donor, target),
        )
    if target not in _RAW_WEIGHTS and config.moe.how == "switch":
        return RefusedDonor(
            f"{where}: moe.combine",
            "`switch`",
            "weights that sum to 1, as this target knows no others",
            _other(donor, target),
        )
    if target == "qwen2_moe":
        head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
        if head_dim * dense.num_attention_heads != dense.hidden_size:
            found = f"heads of {head_dim}, {dense.num_attention_heads} of them, in a hidden size of {dense.hidden_size}"
            return RefusedDonor(
                f"{where}: head_dim", found, "hidden size / heads, which runtimes take", _other(donor, target)
            )
        if donor == "mistral" and getattr(dense, "sliding_window", None):
            found = f"a sliding window of {dense.sliding_window}"
            return RefusedDonor(f"{where}: sliding_window", found, "full attention", _other(donor, target))
    return None


def _other(donor: str, target: str) -> str:
    others = [name for name in TARGETS[donor] if name != target]
    return f"Take target {others[0]}, or the method `pesc`." if others else "Change the setting, or take `pesc`."


def sparse_config(dense: Any, config: UpcycleConfig) -> Any:
    """The transformers config of the mixture. `dense` is left as it is.

    Raises:
        RefusedDonor.
    """
    from transformers import AutoConfig

    dense = base_config(dense)
    target = target_of(dense, config)
    values = {name: copy.deepcopy(getattr(dense, name)) for name in _SHARED if hasattr(dense, name)}
    if config.choosing:
        values[MEAN_TAKEN] = config.moe.ec.capacity_factor
    taken = math.ceil(config.moe.ec.capacity_factor) if config.choosing else config.top_k
    values |= {"num_experts_per_tok": taken, "router_aux_loss_coef": 0.0, "output_router_logits": False}
    made = AutoConfig.for_model(target, **values, **_OWN[target](dense, config))
    made.architectures = [type_name(target)]
    made.dtype = dense.dtype
    made.upcycled_from = str(dense.model_type)  # tells a later tuning which tensors are there without effect
    made._attn_implementation = dense._attn_implementation
    return made


def type_name(target: str) -> str:
    """Name of the stock class."""
    return {
        "mixtral": "MixtralForCausalLM",
        "qwen2_moe": "Qwen2MoeForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "flex_olmo": "FlexOlmoForCausalLM",
    }[target]


def _mixtral(dense: Any, config: UpcycleConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.experts,
        "intermediate_size": dense.intermediate_size,
        "sliding_window": getattr(dense, "sliding_window", None),
        "router_jitter_noise": 0.0,
    }


def _qwen(dense: Any, config: UpcycleConfig) -> dict[str, Any]:
    layers = dense.num_hidden_layers
    chosen = config.block_indices(layers)
    return {
        "num_experts": config.experts,
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": dense.intermediate_size,
        "norm_topk_prob": config.moe.how != "switch",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index in range(layers) if index not in chosen],
        "use_sliding_window": False,
    }


def _qwen2_moe(dense: Any, config: UpcycleConfig) -> dict[str, Any]:
    return {**_qwen(dense, config), "qkv_bias": True, "shared_expert_intermediate_size": 0}


def _qwen3_moe(dense: Any, config: UpcycleConfig) -> dict[str, Any]:
    return {**_qwen(dense, config), "attention_bias": dense.attention_bias}


def _flex_olmo(dense: Any, config: UpcycleConfig) -> dict[str, Any]:
    return {
        "num_experts": config.experts,
        "intermediate_size": dense.intermediate_size,
        "norm_topk_prob": config.moe.how != "switch",
        "attention_bias": dense.attention_bias,
    }


_OWN: dict[str, Callable[[Any, UpcycleConfig], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "flex_olmo": _flex_olmo,
}
