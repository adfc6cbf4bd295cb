"""What SoFT puts on a model: blocks or heads of the exits, float32 masters, and what is remembered between forwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsmith import anatomy

EXITS = "soft_exits"
"""Name of the child that holds what the exits own: `soft_exits.{depth}.block` or `.head`."""
_STATE = "soft_state"


@dataclass
class DepthState:
    """Held on the model; plain numbers and detached sums only."""

    seed: int = 42
    step: int = 0
    micro: int = 0
    loss: dict[int, Tensor] = field(default_factory=dict)
    """Depth -> summed cross-entropy since the last reading."""
    count: dict[int, Tensor] = field(default_factory=dict)
    """Depth -> labelled positions since the last reading."""

    def __deepcopy__(self, memo: dict[int, Any]) -> DepthState:
        return DepthState(self.seed)

    def add(self, depth: int, losses: Tensor, positions: int) -> None:
        """One exit of one micro-batch."""
        total = losses.sum().double()
        number = torch.tensor(float(positions), dtype=torch.float64, device=losses.device)
        self.loss[depth] = self.loss[depth] + total if depth in self.loss else total
        self.count[depth] = self.count[depth] + number if depth in self.count else number


def attach_state(model: nn.Module, seed: int) -> None:
    """On the dense-shaped model inside, which another method may yet wrap."""
    object.__setattr__(anatomy.base_of(model), _STATE, DepthState(seed))


def state_of(model: nn.Module) -> DepthState:
    """The state of a crafted model; an empty one for a model that was read from a settled checkpoint."""
    held = anatomy.base_of(model)
    if not isinstance(getattr(held, _STATE, None), DepthState):
        attach_state(held, 42)
    return cast(DepthState, getattr(held, _STATE))


def exits_of(model: nn.Module) -> dict[int, nn.ModuleDict]:
    """Depth -> what the exit owns; {} where the exits own nothing."""
    held = getattr(model, EXITS, None)
    return {int(name): cast(nn.ModuleDict, part) for name, part in held.items()} if held is not None else {}


def add_blocks(model: nn.Module, depths: tuple[int, ...]) -> None:
    """A block for every exit, started as a copy of the next one."""
    blocks = anatomy.blocks(model)
    held = {str(n): nn.ModuleDict({"block": _copy(blocks[n]).float()}) for n in depths}
    model.add_module(EXITS, nn.ModuleDict(held))


def add_heads(model: nn.Module, depths: tuple[int, ...]) -> None:
    """A head for every exit, started as a copy of the model's."""
    held = {}
    for n in depths:
        head = copy.deepcopy(anatomy.head(model)).float()
        held[str(n)] = nn.ModuleDict({"head": head})
    model.add_module(EXITS, nn.ModuleDict(held))


def trunk_dtype(model: nn.Module) -> torch.dtype:
    """The number type that hidden states have."""
    return next(p.dtype for p in anatomy.blocks(model).parameters() if p.is_floating_point())


def as_read_out(part: nn.Module, kind: torch.dtype) -> nn.Module:
    """A block or head of an exit as the settled model has it: itself, or rounded to the trunk's number type while it trains in float32."""
    if all(p.dtype == kind for p in part.parameters()):
        return part
    return _copy(part).to(kind)


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy whose settings stay the model's own objects: a later change of the attention's implementation must reach it too."""
    shared = {id(part.config): part.config for part in module.modules() if getattr(part, "config", None) is not None}
    return copy.deepcopy(module, dict(shared))


def place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path of the base."""
    parent, _, name = path.rpartition(".")
    base = anatomy.base_of(model)
    setattr(anatomy.walk(base, parent) if parent else base, name, module)


class MasterWeights(nn.Module):
    """A leaf module (norm, head) whose weights are held in float32 and cast to the base's number type for the product, so that small
    updates do not round away. Its parameters bear the same names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "inner", inner)
        for name, parameter in inner.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach().float()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner: Any = self.inner
        cast_back = {name: p.to(getattr(inner, name).dtype) for name, p in self._parameters.items() if p is not None}
        return torch.func.functional_call(inner, cast_back, args, kwargs)

    def settled(self) -> nn.Module:
        """The plain module with the trained weights, rounded once."""
        inner = copy.deepcopy(cast(nn.Module, self.inner))
        for name, parameter in self._parameters.items():
            if parameter is not None:
                own = getattr(inner, name)
                setattr(inner, name, nn.Parameter(parameter.detach().to(own.dtype), requires_grad=False))
        return inner


def hold_masters(model: nn.Module, path: str) -> None:
    """Wrap the module at `path` of the base where its weights are not float32."""
    module = anatomy.walk(anatomy.base_of(model), path)
    if any(p.dtype != torch.float32 for p in module.parameters(recurse=False)):
        place(model, path, MasterWeights(module))


def release_masters(model: nn.Module, path: str) -> None:
    module = anatomy.walk(anatomy.base_of(model), path)
    if isinstance(module, MasterWeights):
        place(model, path, module.settled())


def untie_head(model: nn.Module) -> None:
    """Weights of its own for a head that shares them with the embeddings."""
    base = anatomy.base_of(model)
    row = anatomy.anatomy_of(model)
    head = anatomy.walk(base, row.head)
    fresh = copy.copy(head)
    fresh.__dict__["_parameters"] = dict(head._parameters)
    fresh.weight = nn.Parameter(head.weight.detach().clone())
    place(model, row.head, fresh)
    for holder in (base, model):
        holder.config.tie_word_embeddings = False  # type: ignore[union-attr]
        if isinstance(getattr(holder, "all_tied_weights_keys", None), dict):
            holder.all_tied_weights_keys = {}  # type: ignore[assignment]
