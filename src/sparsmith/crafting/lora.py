"""LoRA for every method that asks for it: injected once, through PEFT, on the linears that the anatomy names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.crafting.lora_count import target_paths
from sparsmith.methods.base import LoraSettings
from sparsmith.seeds import stream_seed

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ADAPTER = "default"
_LORA_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")


def lora_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Full module names of the linears inside the blocks that get a LoRA; never head, embeddings, router or adapters.

    Raises:
        MethodError: a target name that the family does not have.
    """
    row = anatomy.anatomy_of(model)
    wanted = [(path, *row.linears[path]) for path in target_paths(row, settings)]
    inside = {
        id(module)
        for block in anatomy.blocks(model)
        for path, module in block.named_modules()
        if hasattr(module, "weight") and any(_is_linear(path, *one) for one in wanted)
    }
    return [name for name, module in model.named_modules() if id(module) in inside]


def _is_linear(path: str, wanted: str, part: str, name: str) -> bool:
    """Whether a module of a block is the wanted linear: at its path, or further inside where a method has wrapped it (under its own name)
    or its part."""
    wrapped = f"{wanted}.{wanted.rsplit('.', 1)[-1]}"
    return path in (wanted, wrapped) or (bool(part) and path.startswith(f"{part}.") and path.endswith(f".{name}"))


def lora_config(model: nn.Module, settings: LoraSettings) -> LoraConfig:
    """PEFT's config for exactly these modules."""
    from peft import LoraConfig

    targets = lora_targets(model, settings)
    modules = dict(model.named_modules())
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by r; a float is as good
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in targets),
    )


def inject_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
    """Put the LoRA in, with weights from its own stream, in float32."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stream_seed(seed, "lora.init"))
        model.add_adapter(lora_config(model, settings), adapter_name=ADAPTER)
    for _, parameter in lora_parameters(model):
        parameter.data = parameter.data.float()


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every LoRA tensor."""
    return [(name, p) for name, p in model.named_parameters() if any(part in name for part in _LORA_PARTS)]
