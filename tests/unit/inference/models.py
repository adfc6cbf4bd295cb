"""Depth-elastic pico models, and the naive text that every way of generating is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparsmith as sm
from sparsmith import anatomy
from tests.kit.pico import FAMILIES, pico_ids, pico_model

LAYERS = 4
EXITS = (2, 3, 4)
FAMILIES_AND_WINDOWS = (*FAMILIES, "mistral, window 8")
_HYBRID = ["sliding_attention", "full_attention"] * 2


def deep(
    family: str = "llama", *, agree: float | None = None, sharp: float = 1.0, exact: bool = False, **changes: Any
) -> Any:
    """A pico model of 4 blocks. `agree` scales what the blocks behind the first add, so that exits say much the same as the full
    model; `sharp` scales the logits, so that probabilities are not all alike; `exact` = ready for float64 (eager attention would take
    its softmax in float32; Gemma 2 has no other)."""
    if family == "mistral, window 8":
        family, changes = "mistral", {"sliding_window": 8, **changes}
    if family in ("gemma2", "gemma3_text"):
        changes = {"layer_types": _HYBRID, **changes}
    model = pico_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS}, **changes)
    with torch.no_grad():
        if agree is not None:
            for block in list(anatomy.blocks(model))[1:]:
                _shrink(block, model, agree)
        _scale(anatomy.walk(model, anatomy.anatomy_of(model).norm), sharp, model)
    if exact and family != "gemma2":
        model.set_attn_implementation("sdpa")
    return model


def elastic(family: str = "llama", *, exits: tuple[int, ...] = EXITS, trunk: str = "shared", **kind: Any) -> Any:
    """`deep`, with exits. Of a frozen trunk, the exits' own blocks are moved off their start."""
    model = sm.craft(deep(family, **kind), sm.SoftConfig(exits=exits, trunk=trunk), proof=False).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("soft_exits"):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.double() if kind.get("exact") and family != "gemma2" else model


def padded(rows: int, length: int = 12) -> tuple[Tensor, Tensor]:
    """(ids, mask) of prompts of unequal length, padded on the left."""
    ids = pico_ids(rows, length)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : (3 * row) % length] = 0
    return ids.masked_fill(mask == 0, 0), mask


def prompts_of(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows without their padding, (1, S) each."""
    return [row[None] if mask is None else row[mask[place].bool()][None] for place, row in enumerate(ids)]


@torch.no_grad()
def naive_greedy(model: Any, prompt: Tensor, new: int, eos: int | None = None) -> list[int]:
    """The answer of one prompt: every token from a whole forward without a cache."""
    ids, answer = prompt, []
    for _ in range(new):
        token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == eos:
            break
    return answer


def answers_of(out: Tensor, start: int, eos: int | None = None) -> list[list[int]]:
    """The new tokens of each row, up to and with its end token; what follows must be padding (0)."""
    found = []
    for row in out[:, start:].tolist():
        length = row.index(eos) + 1 if eos in row else len(row)
        assert set(row[length:]) <= {0}
        found.append(row[:length])
    return found


def snapshot(model: Any) -> dict[str, Any]:
    """What no call may change: configs, hooks, training flags, children, weights' places."""
    base = anatomy.base_of(model)
    return {
        "config": model.config.to_dict(),
        "base config": base.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "training": [(name, module.training) for name, module in model.named_modules()],
        "children": [(name, id(module)) for name, module in model.named_modules()],
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        ],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "weights": [(name, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
    }


def _shrink(block: Any, model: Any, factor: float) -> None:
    row = anatomy.anatomy_of(model)
    after = [m for name, m in block.named_children() if name.startswith("post_") and row.post_ffn_norm]
    if after:
        for norm in after:
            _scale(norm, factor, model)
        return
    for part, name in (
        (anatomy.attention_of(block), row.attention_linears[-1]),
        (anatomy.ffn_of(block), row.ffn_linears[-1]),
    ):
        for parameter in anatomy.walk(part, name).parameters():
            parameter *= factor


def _scale(norm: Any, factor: float, model: Any) -> None:
    if "gemma" in model.config.model_type:  # Gemma's norms multiply by 1 + weight
        norm.weight += 1
        norm.weight *= factor
        norm.weight -= 1
    else:
        for parameter in norm.parameters():
            parameter *= factor
