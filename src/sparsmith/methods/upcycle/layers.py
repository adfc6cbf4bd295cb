"""Routers and experts while they train: subclasses of the family's own, made when they are needed, that hold the same weights under the
same names. Settling gives a module its family's class back.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsmith import anatomy
from sparsmith.ops.balance import several_ranks
from sparsmith.ops.route_context import RouteContext
from sparsmith.ops.routing import Routing
from sparsmith.ops.token_choice import capacity_of, jitter, keep_second, route_tokens, within_capacity


@dataclass(frozen=True)
class RouterSettings:
    """What a router needs of the method's settings."""

    combine: str
    second_expert_drop: bool
    capacity_factor: float | None
    jitter: float


class Routed(nn.Module):
    """Mixed into a family's router: logits in float32 from a copy of the input, and all that happens in training alone."""

    settings: RouterSettings
    context: RouteContext
    block: int
    weight: nn.Parameter
    top_k: int
    num_experts: int

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(T, E) logits, (T, K) weights, (T, K) indices."""
        x_TD, settings = hidden_states.reshape(-1, hidden_states.shape[-1]), self.settings
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training and settings.jitter:
                x_TD = jitter(x_TD, settings.jitter)
            logits_TE = functional.linear(x_TD.to(self.weight.dtype), self.weight)
            wide = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
            routing = route_tokens(wide, self.top_k, settings.combine)
        weights_TK = routing.gates
        if self.training:
            self.context.record(self.block, routing, self.num_experts, True)
            weights_TK = self._thinned(routing)
        return logits_TE, weights_TK, routing.indices

    def _thinned(self, routing: Routing) -> Tensor:
        """The weights, 0 where a slot is dropped; the others stay as they are."""
        settings, weights_TK = self.settings, routing.gates
        if not settings.second_expert_drop and settings.capacity_factor is None:
            return weights_TK
        kept_TK = torch.ones_like(weights_TK, dtype=torch.bool)
        if settings.second_expert_drop:
            kept_TK = keep_second(weights_TK)
        context = self.context
        if settings.capacity_factor is not None:
            rows, length = context.shape
            if rows * length != len(weights_TK):
                raise RuntimeError(
                    f"A capacity needs whole rows: {len(weights_TK)} tokens came, not {rows} x {length}."
                )
            mask_T = context.mask
            wanted_TK = kept_TK if mask_T is None else kept_TK & mask_T.to(kept_TK.device)[:, None]
            capacity = capacity_of(settings.capacity_factor, length, self.top_k, self.num_experts)
            kept_TK = within_capacity(routing.indices, self.num_experts, rows, capacity, wanted_TK)
            asked, served = wanted_TK.sum(), kept_TK.sum()
            dropped = 1 - served / asked.clamp(min=1)
            context.note("drop_rate", dropped / _ranks())
        return weights_TK * kept_TK


def _ranks() -> int:
    """Figures are summed over the ranks when they are read."""
    return torch.distributed.get_world_size() if several_ranks() else 1


class _Thinning(nn.Module):
    """Mixed into a family's experts: dropout behind the gated activation."""

    expert_dropout: float

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        inner = super()._apply_gate(gate_up_out)  # type: ignore[misc]
        return functional.dropout(inner, self.expert_dropout, self.training)


@cache
def mixed(mixin: Any, family: Any) -> type:
    """The subclass of a family's module with a mixin before it."""
    return type(f"{mixin.__name__.strip('_')}{family.__name__}", (mixin, family), {"__module__": __name__})


class AddLosses:
    """A hook behind the model's forward: with `labels` while training, the loss holds the weighted routing losses, so that a loop or a
    trainer of another library does not train without them. Our own objective calls the decoder and adds its terms itself."""

    def __init__(self, context: RouteContext, weights: Mapping[str, float], norm: str) -> None:
        self.context, self.weights, self.norm = context, dict(weights), norm

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training or getattr(output, "loss", None) is None:
            return
        losses = self.context.losses(self.norm)
        for name, weight in self.weights.items():
            output.loss = output.loss + weight * losses[name].to(output.loss.device)


def hook(model: nn.Module, context: RouteContext, weights: Mapping[str, float], norm: str) -> None:
    """Open the context whenever the decoder is called, and add the losses to that of the model's own forward, in place."""
    from sparsmith.methods.wrapped import Opener  # with the library's generation code, which a plan need not load

    anatomy.backbone(model).register_forward_pre_hook(Opener(context), with_kwargs=True)
    model.register_forward_hook(AddLosses(context, weights, norm), with_kwargs=True)


def unhook(model: nn.Module) -> None:
    """Take both away again."""
    from sparsmith.methods.wrapped import Opener

    for hooks in (anatomy.backbone(model)._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, one in hooks.items() if isinstance(one, (Opener, AddLosses))]:
            del hooks[key]


def graft(model: nn.Module, settings: RouterSettings, expert_dropout: float, context: RouteContext) -> None:
    """Let every sparse block's router (and experts, where they are thinned) train as the settings say, in place."""
    for index, ffn in sparse_blocks(model):
        row = anatomy.anatomy_of(model)
        router, experts = getattr(ffn, row.router), experts_of(ffn, row.experts)
        router.__class__ = mixed(Routed, cast(Any, type(router)))
        router.settings, router.block = settings, index
        object.__setattr__(router, "context", context)
        shared = [getattr(ffn, name) for name in ("shared_expert", "shared_expert_gate") if hasattr(ffn, name)]
        for module in (router, experts, *shared):
            module.sparsmith_grafted = True
    thin(model, expert_dropout)


def thin(model: nn.Module, expert_dropout: float) -> None:
    """Put dropout into the experts of every sparse block, in place, where there is any."""
    for _, ffn in sparse_blocks(model) if expert_dropout else ():
        experts = getattr(ffn, anatomy.anatomy_of(model).experts)
        experts.__class__ = mixed(_Thinning, cast(Any, type(experts)))
        experts.expert_dropout = expert_dropout


def hide_idle(model: nn.Module, names: frozenset[str]) -> None:
    """Let methods that train a block's own tensors see which of them are there without effect."""
    for name in names:
        home, _, own = name.rpartition(".")
        module = model.get_submodule(home)
        module.sparsmith_idle = (*getattr(module, "sparsmith_idle", ()), own)  # type: ignore[assignment]


def ungraft(model: nn.Module) -> None:
    """Give the modules their family's classes back, in place."""
    row = anatomy.anatomy_of(model)
    for _, ffn in sparse_blocks(model):
        shared = [getattr(ffn, name) for name in ("shared_expert", "shared_expert_gate") if hasattr(ffn, name)]
        for module in (getattr(ffn, row.router), experts_of(ffn, row.experts), *shared):
            if isinstance(module, (Routed, _Thinning)):
                module.__class__ = type(module).__bases__[1]
            for name in ("settings", "context", "block", "expert_dropout", "sparsmith_grafted"):
                module.__dict__.pop(name, None)


def sparse_blocks(model: nn.Module) -> list[tuple[int, Any]]:
    """(index, FFN) of every sparse block."""
    return [(index, ffn) for index, _, ffn in sparse_places(model)]


def sparse_places(model: nn.Module) -> list[tuple[int, str, Any]]:
    """(index, path from the base, FFN) of every sparse block. Of an encoder-decoder the encoder's blocks are counted first."""
    row = anatomy.anatomy_of(model)
    if not row.experts:
        return []
    return [(index, path, ffn) for index, path, ffn in anatomy.ffns(model) if hasattr(ffn, row.experts)]


def experts_of(ffn: Any, name: str) -> Any:
    """The family's own module of the stacked experts, from inside what a LoRA has put around it."""
    module = getattr(ffn, name)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def context_of(model: nn.Module) -> RouteContext:
    """The route context that all routers of a grafted model share."""
    row, (_, ffn) = anatomy.anatomy_of(model), sparse_blocks(model)[0]
    return (ffn if hasattr(ffn, "context") else getattr(ffn, row.router)).context
