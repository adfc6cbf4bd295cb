"""LoRA for every method that asks for it: injected once, through PEFT, on the linears that the anatomy names and, where a
method says so, on the stacked experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.crafting.lora_count import lora_places
from sparsmith.methods.base import LoraSettings
from sparsmith.seeds import stream_seed

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ADAPTER = "default"
_LORA_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")


def lora_targets(model: nn.Module, settings: LoraSettings, experts: bool = False) -> tuple[list[str], list[str]]:
    """What gets a LoRA: full names of linears inside the blocks, and of stacked tensors; never head, embeddings, router or adapters.

    Args:
        experts: whether the stacked experts may be adapted.

    Raises:
        MethodError: a target name that the model does not have.
    """
    row = anatomy.anatomy_of(model)
    places = lora_places(settings, row, anatomy.shape_of(model), experts)
    everywhere, dense = ([(path, *row.linears[path]) for path in side] for side in (places.everywhere, places.dense))
    shared = [(f"{row.ffn}.shared_expert.{name}", "", name) for name in places.shared]
    linears, stacks = set(), set()
    for block in anatomy.blocks(model):
        module = getattr(anatomy.ffn_of(block, row), row.experts, None) if row.experts else None
        wanted = everywhere + (dense if module is None else shared)
        linears |= {id(m) for p, m in block.named_modules() if hasattr(m, "weight") and _is_any(p, wanted)}
        stacks |= set() if module is None else {id(module)}
    named = list(model.named_modules())
    tensors = [f"{name}.{tensor}" for name, module in named if id(module) in stacks for tensor in places.stacked]
    return [name for name, module in named if id(module) in linears], tensors


def _is_any(path: str, wanted: list[tuple[str, str, str]]) -> bool:
    return any(_is_linear(path, *one) for one in wanted)


def _is_linear(path: str, wanted: str, part: str, name: str) -> bool:
    """Whether a module of a block is the wanted linear: at its path, or further inside where a method has wrapped it (under its own name)
    or its part."""
    wrapped = f"{wanted}.{wanted.rsplit('.', 1)[-1]}"
    return path in (wanted, wrapped) or (bool(part) and path.startswith(f"{part}.") and path.endswith(f".{name}"))


def lora_config(model: nn.Module, settings: LoraSettings, experts: bool = False) -> LoraConfig:
    """PEFT's config for exactly these modules and stacked tensors."""
    from peft import LoraConfig

    targets, tensors = lora_targets(model, settings, experts)
    modules = dict(model.named_modules())
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by r; a float is as good
        lora_dropout=settings.dropout,
        target_modules=targets,
        target_parameters=tensors or None,
        bias="none",
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in targets),
    )


def inject_lora(model: PreTrainedModel, settings: LoraSettings, seed: int, experts: bool = False) -> None:
    """Put the LoRA in, with weights from its own stream, in float32."""
    config = lora_config(model, settings, experts)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _no_family(model.config):
        torch.manual_seed(stream_seed(seed, "lora.init"))
        model.add_adapter(config, adapter_name=ADAPTER)
    for _, parameter in lora_parameters(model):
        parameter.data = parameter.data.float()


@contextmanager
def _no_family(config: Any) -> Iterator[None]:
    """Inside, the config tells no family. PEFT rewrites targets by it: to open adapters that were trained when each expert was a module
    of its own, it takes every `gate_proj` of a Qwen mixture for one of an expert, also that of a dense block, and adapts the stacked
    experts in its place, at twice the rank."""
    own = vars(config).get("model_type")
    config.model_type = ""
    try:
        yield
    finally:
        if own is None:
            del config.model_type
        else:
            config.model_type = own


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every LoRA tensor."""
    return [(name, p) for name, p in model.named_parameters() if any(part in name for part in _LORA_PARTS)]
