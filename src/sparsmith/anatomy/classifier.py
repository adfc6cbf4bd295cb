"""The class head of a sequence classifier.

It is held in float32 from crafting until settling, because it trains whole: small updates of a bfloat16 weight would round away. Its input
is cast to it by a hook, its parameters keep their names; settling rounds it back once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsmith.anatomy.access import anatomy_of, base_of, walk
from sparsmith.anatomy.tasks import SEQ_CLS, task_of
from sparsmith.errors import UnsupportedAnatomy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def classifier(model: nn.Module) -> nn.Module:
    """The class head of a sequence classifier, base or crafted.

    Raises:
        UnsupportedAnatomy: a language model.
    """
    base = base_of(model)
    if task_of(base) != SEQ_CLS:
        raise UnsupportedAnatomy(
            type(base).__name__, "a model without a class head", "a sequence classifier", "Set model.task to seq_cls."
        )
    return walk(base, anatomy_of(model).classifier)


def classifier_tensors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name in the model, parameter) of the class head: what a method's role `classifier` holds."""
    held = {id(parameter) for parameter in classifier(model).parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in held]


def widen_classifier(model: nn.Module) -> None:
    """Hold the class head in float32 and cast what it reads; nothing where it is float32 already."""
    import torch
    from torch import nn

    head = classifier(model)
    if all(parameter.dtype == torch.float32 for parameter in head.parameters()):
        return
    for module in head.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            wide = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            module._parameters[name] = wide  # an object of its own, so that a craft that fails can put the old one back
    head.register_forward_pre_hook(_to_float32)


def narrow_classifier(model: nn.Module, dtype: torch.dtype) -> None:
    """Take back `widen_classifier`: the head in the number type of the base, rounded once, and no hook."""
    from torch import nn

    head = classifier(model)
    for key, hook in list(head._forward_pre_hooks.items()):
        if hook is _to_float32:
            del head._forward_pre_hooks[key]
    for module in head.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != dtype:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in inputs)
