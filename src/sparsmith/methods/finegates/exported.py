"""What holds of a model that was cut: what other runtimes make of its sizes, and how a per-layer one is treated by what comes after."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsmith import anatomy
from sparsmith.errors import MethodError
from sparsmith.methods.finegates.prune import is_slim

QUANT_BLOCK = 256
"""Numbers of a row that llama.cpp's K-quants take together (llama.cpp issue 6614)."""


def layers_of(model: Any) -> list[dict[str, Any]]:
    """The sizes of every block, as `slim.per_layer_config` has them; of a model of one shape all alike."""
    if is_slim(model):
        return list(model.config.slim["per_layer_config"])
    shape = anatomy.shape_of(model)
    one = {"intermediate_size": shape.ffn_width, "num_attention_heads": shape.heads}
    return [{**one, "num_key_value_heads": shape.kv_heads, "attention": True, "ffn": True}] * shape.layers


def cautions(model: nn.Module) -> tuple[str, ...]:
    """K-quants of llama.cpp need rows that are multiples of 256 and fall back to larger types elsewhere."""
    shape, layers = anatomy.shape_of(model), layers_of(model)
    widths = sorted({layer["intermediate_size"] for layer in layers if layer["ffn"]})
    heads = sorted({layer["num_attention_heads"] * shape.head_dim for layer in layers if layer["attention"]})
    found = []
    for what, sizes in (("FFN width", widths), ("attention width (kept heads x head size)", heads)):
        odd = [str(size) for size in sizes if size % QUANT_BLOCK]
        if odd:
            tail = "llama.cpp's K-quants fall back to larger types there."
            found.append(f"{what} {', '.join(odd)} is no multiple of {QUANT_BLOCK}: {tail}")
    return tuple(found)


def cut_sizes(view: Any, depth: int) -> None:
    """The sizes of the first `depth` blocks, for a view of them. The lists of the model are left as they are."""
    slim = view.config.slim
    blocks = len(anatomy.blocks(view))
    if blocks != depth:
        mend = "Settle with scope uniform, or export the depths of an uncut model."
        raise MethodError(
            "depth", "exits with blocks of their own on a per-layer model", "exits that share the blocks", mend
        )
    view.config.slim = {**slim, "per_layer_config": slim["per_layer_config"][:depth]}


def refuse_slim(model: nn.Module) -> None:
    """Blocks of unequal width cannot be gated anew: the gates are counted by one shape.

    Raises:
        MethodError.
    """
    if is_slim(model):
        mend = "Export the first cut as uniform or padded, and go on from that."
        raise MethodError("finegates", "a per-layer model", "a model of one shape", mend)
