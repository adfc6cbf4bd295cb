"""`block_configs` as DeciLM checkpoints have them, for a per-layer Llama: FFN widths as multipliers, and halves that are left out.

    intermediate size = ffn_mult * 2 d / 3, rounded up to a multiple of 256, so ffn_mult = 3 K / 2 d with K a multiple of 256

Query heads are one number for the whole model there, and `n_heads_in_group` is how many of them share keys, so head counts that differ
cannot be said. The file describes the model for runtimes that read this format; it was written by its rules and run nowhere by us. Weights
keep their names; those of a left-out half are not there, its norm is.
"""

from __future__ import annotations

from typing import Any

from sparsmith.errors import LayoutMismatch
from sparsmith.methods.finegates.modeling import SparsmithSlimForCausalLM

FILE, STEP = "deci_config.json", 256


def deci_config(model: Any) -> dict[str, Any]:
    """The config of a per-layer Llama in DeciLM's words.

    Raises:
        LayoutMismatch: another form or family, heads that were cut, or a width that is no multiple of 256.
    """
    where = "export: deci"
    if not isinstance(model, SparsmithSlimForCausalLM) or model.config.base_config.model_type != "llama":
        kind = getattr(getattr(model.config, "base_config", None), "model_type", model.config.model_type)
        found = f"{type(model).__name__} of {kind}"
        raise LayoutMismatch(where, found, "a Llama in the form per-layer", "Export a Llama with form per-layer.")
    base, layers = model.config.base_config, model.config.slim["per_layer_config"]
    heads, groups = base.num_attention_heads, base.num_key_value_heads
    blocks = []
    for index, layer in enumerate(layers):
        width, own = layer["intermediate_size"], (layer["num_attention_heads"], layer["num_key_value_heads"])
        if layer["attention"] and own != (heads, groups):
            found = f"block {index} with {own[0]} query heads and {own[1]} key-value groups"
            mend = "Settle with gates.attention none (gates.blocks may be true)."
            raise LayoutMismatch(where, found, f"{heads} and {groups} in every block, which are global there", mend)
        if layer["ffn"] and width % STEP:
            nearest = max(STEP, round(width / STEP) * STEP)
            mend = f"Settle with settle.unit {STEP}."
            raise LayoutMismatch(
                where, f"block {index} with FFN width {width}", f"a multiple of {STEP}, as {nearest}", mend
            )
        attention = {
            "n_heads_in_group": heads // groups if layer["attention"] else None,
            "no_op": not layer["attention"],
        }
        ffn = {"ffn_mult": 3 * width / (2 * base.hidden_size) if layer["ffn"] else None, "no_op": not layer["ffn"]}
        extra = {"replace_with_linear": False}
        blocks.append({"attention": {**attention, **extra}, "ffn": {**ffn, **extra}})
    kept = {
        key: value for key, value in base.to_dict().items() if key not in ("intermediate_size", "num_key_value_heads")
    }
    return {**kept, "model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "block_configs": blocks}
