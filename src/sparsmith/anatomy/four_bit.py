"""Linears that bitsandbytes holds in 4 bits, how they are kept as they were read, and in which numbers a model is held."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from sparsmith.errors import MethodError


def quantised_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the bitsandbytes 4-bit linears."""
    return [
        (name, m)
        for name, m in model.named_modules()
        if type(m).__name__ == "Linear4bit" and type(m).__module__.startswith("bitsandbytes")
    ]


def stored(model: nn.Module) -> tuple[str, bool]:
    """(number type of its floats: the first one that is not float32, if any; whether linears are packed in 4 bits)."""
    other = (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32)
    packed = any(type(p).__name__ == "Params4bit" for p in model.parameters())
    return str(next(other, torch.float32)).removeprefix("torch."), packed


def hold_as_read(model: nn.Module) -> None:
    """From here on no forward changes a 4-bit linear, so that a model that has run and one that has not are the same.

    Left to itself the library casts a bias for good in the first forward; and on a CPU with AVX512-BF16 the first one without gradient
    lays the weights out anew with their scales rounded to bfloat16: another function than the one that is trained, a base whose hash is
    no longer that of its file, and an error for sizes that its kernel does not know.

    Raises:
        MethodError: such a forward came before.
    """
    for name, module in quantised_linears(model):
        linear = cast(Any, module)
        if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
            found = "4-bit weights that a forward on this CPU has laid out anew, their scales rounded to bfloat16"
            mend = "Read the model again and craft it before its first forward."
            raise MethodError(name, found, "weights as they were read", mend)
        linear.support_avx512bf16_for_cpu = False
        if (
            linear.bias is not None and linear.compute_dtype is not None
        ):  # None: the library takes it from its first input
            linear.bias.data = linear.bias.data.to(linear.compute_dtype)
