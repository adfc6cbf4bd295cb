"""The role `bias`: biases of the linears inside the blocks that train beside the gates (`train_bias`). None is ever created."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.errors import MethodError
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.places import plain_linear

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape

ROLE = "bias"


def wants_biases(config: FineGatesConfig, classifier: bool) -> bool:
    """`auto` means: in the paper's layout, where a classifier is tuned."""
    if config.train_bias == "auto":
        return classifier and not config.structured
    return config.train_bias


def is_classifier(model: nn.Module) -> bool:
    """True for a sequence classifier."""
    return anatomy.task_of(anatomy.base_of(model)) == anatomy.SEQ_CLS


def biases_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the bias of every linear of the blocks, behind gates and LoRA; a family without biases has none."""
    shape = anatomy.shape_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for block in anatomy.blocks(model):
        for path in shape.linears:
            linear = plain_linear(block, path)
            bias = getattr(linear, "bias", None)
            if isinstance(bias, nn.Parameter):
                found.append((f"{names[id(linear)]}.bias", bias))
    return found


def bias_count(config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> int:
    """Trained biases, from shapes alone."""
    if not wants_biases(config, bool(getattr(shape, "classes", 0))):
        return 0
    return shape.layers * sum(out for path, (_, out) in shape.linears.items() if path in shape.biases)


def check_biases(model: nn.Module) -> None:
    """Trained biases are their own masters: the base must hold them in float32.

    Raises:
        MethodError.
    """
    for name, bias in biases_of(model):
        if bias.dtype != torch.float32:
            raise MethodError(
                "finegates.train_bias",
                f"{name} in {str(bias.dtype).removeprefix('torch.')}",
                "float32: small updates round away in fewer bits",
                "Set model.dtype to float32 (train.precision may still be bfloat16), or train_bias to false.",
            )
