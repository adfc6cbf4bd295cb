"""Where a number that is not finite came from: a micro-batch is computed again, this time watched module by module.

Only called when a run stops, so it may wait for the device after every module. Two looks: the forward names the first module whose output
is not finite; if the forward is clean, the backward names the first gradient that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsmith.ops.shards import part


@dataclass(frozen=True)
class Finding:
    """The first bad place."""

    module: str
    """Its name in the crafted model."""
    what: str
    """What of it is not finite, in words."""
    micro_batch: int = 0
    """Which micro-batch of the step, from 0."""

    def __str__(self) -> str:
        """A part of the message: what is not finite, of which module."""
        return f"first bad module `{self.module}` ({self.what})"


def bad_parameter(model: nn.Module, *, trained_only: bool = False) -> Finding | None:
    """The first parameter that holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if (parameter.requires_grad or not trained_only) and _bad(parameter):
            count = int((~torch.isfinite(part(parameter))).sum())
            module, _, own = name.rpartition(".")
            return Finding(module or _ROOT, f"{count} of the {parameter.numel():,} numbers in its parameter `{own}`")
    return None


def bad_forward(model: nn.Module, run: Callable[[], dict[str, Any]]) -> Finding | None:
    """The first module whose output is not finite while `run` computes the objective's dict for a micro-batch."""
    watch = _ForwardWatch(_Names(model))
    with _hooked(model, watch.enter, watch.leave):
        outputs = run()
    if watch.found is not None:
        return watch.found
    for name, value in outputs["terms"].items():
        if _bad(value):
            return Finding(_ROOT, f"the loss term `{name}`")
    return Finding(_ROOT, "the loss") if _bad(outputs["loss"]) else None


def bad_backward(model: nn.Module, run: Callable[[], None]) -> Finding | None:
    """The first gradient that is not finite while `run` computes a forward and a backward, in the backward's order."""
    names = _Names(model)
    found: list[Finding] = []

    def look(gradient: Tensor, module: str, what: str) -> None:
        if not found and _bad(gradient):
            found.append(Finding(module, what))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(lambda g: look(g, names[module], "the gradient that comes back to its output"))

    handles = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, _, own = name.rpartition(".")
            what = f"the gradient of its parameter `{own}`"
            handles.append(parameter.register_hook(lambda g, m=module or _ROOT, w=what: look(g, m, w)))
    try:
        with _hooked(model, None, leave):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def overflown_gradient(model: nn.Module) -> Finding | None:
    """Where the largest gradient lies, when their norm overflows though each of them is finite; None where it does not."""
    norms = {n: part(p.grad).double().norm().item() for n, p in model.named_parameters() if p.grad is not None}
    name = max(norms, key=lambda one: norms[one], default="")
    if not name or norms[name] < _OVERFLOW:
        return None
    module, _, own = name.rpartition(".")
    return Finding(module or _ROOT, f"the gradient of its parameter `{own}` has the norm {norms[name]:.2e}")


_ROOT = "objective"
_OVERFLOW = 1e18  # its square is near the largest float32


@dataclass
class _ForwardWatch:
    names: _Names
    found: Finding | None = None
    inside: list[str] = field(default_factory=list)

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A bad input before any bad output: the module around this one made it between its children."""
        name = self.names[module]
        given = (args, {key: value for key, value in kwargs.items() if "mask" not in key})  # masks may hold -inf
        if self.found is None and any(map(_bad, _tensors(given))):
            self.found = Finding(self.inside[-1] if self.inside else _ROOT, f"what it hands to `{name}`")
        self.inside.append(name)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.inside.pop()
        if self.found is None and any(map(_bad, _tensors(output))):
            self.found = Finding(self.names[module], "its output")


@contextmanager
def _hooked(model: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    handles = []
    for module in model.modules():
        if enter is not None:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Names:
    """Name of a module, and of a view of it (`anatomy.views`), which has the same hooks and so calls ours."""

    def __init__(self, model: nn.Module) -> None:
        modules = model.named_modules()
        self._of = {id(module._forward_hooks): name or type(module).__name__ for name, module in modules}

    def __getitem__(self, module: nn.Module) -> str:
        return self._of[id(module._forward_hooks)]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(part(tensor.detach())).all())
