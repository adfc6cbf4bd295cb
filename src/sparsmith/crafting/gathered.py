"""A sharded model's trained tensors made whole, for as long as they are written.

Price: every rank gathers one tensor after the other on its device; the first keeps them all in host memory (the size of the delta).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sparsmith import ranks
from sparsmith.crafting.delta import method_state
from sparsmith.crafting.lora import lora_parameters
from sparsmith.ops.shards import is_sharded, whole


def reshard(model: nn.Module) -> None:
    """Let go of what an evaluation has left gathered: the modules then hold the parameters that the optimiser moves."""
    if not ranks.sharded():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block the first rank's `model` holds its trained tensors whole. Every rank must enter; a model in one piece is left."""
    reshard(model)
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        yield
        return
    wanted = {*method_state(model), *(name for name, _ in lora_parameters(model))}
    slots = []
    try:
        for path, module in model.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or f"{path}.{name}".lstrip(".") not in wanted or not is_sharded(parameter):
                    continue
                tensor = whole(parameter.detach())
                if ranks.is_first():
                    slots.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(tensor.cpu(), requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in slots:
            module._parameters[name] = parameter
