"""Models with settled FineGates whose choice is set by hand: what is closed and how soft the rest is, per block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import sparsmith as sm
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import KINDS, sites
from tests.kit.depths import changes_of
from tests.kit.pico import pico_ids, pico_model

CONFIG = FineGatesConfig(
    target=0.7,
    gates={"blocks": True, "attention": "kv_groups+q_heads"},
    settle={"unit": 16, "survivors": "keep"},
)
BARE = {"input_sum", "input_square", "input_count", "logit", "scale", "kept", "settled", "pull", "dual", "sigma", "aim"}


def gated(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    units: Sequence[int] = (48,) * 4,
    groups: Sequence[int] = (1,) * 4,
    heads: Sequence[int] | None = (0, 2),
    closed: Sequence[tuple[int, str]] = (),
    soft: bool = True,
    soft_blocks: bool = True,
    config: FineGatesConfig = CONFIG,
    base: Any = None,
    **changes: Any,
) -> Any:
    """Four blocks, crafted and settled by hand, in evaluation mode.

    Args:
        units, groups: how many each block keeps; which ones is drawn. heads: open query heads (of 4 in 2 groups); None = all.
        closed: (block, `attention_block` or `ffn_block`) pairs. soft, soft_blocks: scales of units and heads, and of blocks, below 1.
    """
    if base is None:
        base = pico_model(family, dtype=dtype, **changes_of(family), **changes)
    model = sm.craft(base, config, inplace=True, proof=False)
    generator = torch.Generator().manual_seed(1)
    for layer, site in enumerate(sites(model)):
        for kind in KINDS:
            gate = site.gate(kind)
            if gate is None:
                continue
            kept = torch.zeros(gate.size, dtype=torch.bool)
            drawn = torch.randperm(gate.size, generator=generator)
            if kind.endswith("block"):
                kept[:] = (layer, kind) not in closed
            elif kind == "heads":
                kept[list(range(gate.size) if heads is None else heads)] = True
            else:
                kept[drawn[: units[layer] if kind == "units" else groups[layer]]] = True
            gate.settle(kept, True)
            if soft_blocks if kind.endswith("block") else soft:
                gate.scale.data.copy_(torch.rand(gate.size, generator=generator) * 0.9 + 0.05)
    return model.eval()


UNEVEN: Mapping[str, Any] = {
    "units": (48, 64, 32, 96),
    "groups": (2, 1, 1, 1),
    "closed": ((0, "attention_block"), (2, "attention_block"), (2, "ffn_block"), (3, "ffn_block")),
}
"""Block 0 without attention, block 1 whole, block 2 closed, block 3 without FFN."""
WHOLE: Mapping[str, Any] = {"closed": ((1, "attention_block"), (1, "ffn_block"))}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(pico_ids(2, 20, seed=4), use_cache=False).logits


def tokens(model: Any) -> list[int]:
    """Greedy, with the cache."""
    ids = pico_ids(1, 9, seed=5)
    out = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    return out[0].tolist()


def gate_keys(names: Any) -> list[str]:
    """Of tensor names: those that only a model with gates has."""
    return [name for name in names if name.rsplit(".", 1)[-1] in BARE or "finegates" in name]
