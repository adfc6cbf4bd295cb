"""SwitchTransformers, the literal donor of FLAN-MoE: an encoder-decoder that was pre-trained sparse, one expert per token.

Each stack has a context of its own, as its tokens and its padding are its own; their losses are a mean over the sparse blocks of both.

Shapes: B rows, S tokens of a stack, T = B*S tokens, D hidden, E experts, K = 1 expert per token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsmith import anatomy
from sparsmith.errors import MethodError
from sparsmith.methods.base import Batch
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.methods.upcycle.layers import (
    AddLosses,
    Routed,
    RouterSettings,
    experts_of,
    mixed,
    sparse_blocks,
    ungraft,
    unhook,
)
from sparsmith.ops.route_context import RouteContext
from sparsmith.ops.routing import Routing
from sparsmith.ops.token_choice import jitter

MODEL_TYPE = "switch_transformers"
UNBOUNDED = 1 << 20
"""`expert_capacity` of what is exported. The library counts slots up to it and allocates nothing by it; no row is as long."""


def is_switch(model_or_config: Any) -> bool:
    """True for the family's models and configs."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config, "model_type", "") == MODEL_TYPE


class PairedRoutes:
    """The contexts of the two stacks, seen as one: what a method and the health figures ask of a context."""

    def __init__(self) -> None:
        self.encoder, self.decoder = RouteContext(), RouteContext()
        self.terms: dict[str, list[Tensor]] = {}
        self.router_grads: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PairedRoutes:
        """A copied model starts with contexts of its own, the same that its copied routers hold."""
        made = memo.setdefault(id(self), type(self)())
        made.encoder, made.decoder = copy.deepcopy(self.encoder, memo), copy.deepcopy(self.decoder, memo)
        return made

    @property
    def counts(self) -> dict[int, Tensor]:
        """Block -> slots taken; the encoder's blocks are counted first."""
        return {**self.encoder.counts, **self.decoder.counts}

    def hand(self, batch: Batch) -> None:
        """Give the next forward its masks: the encoder's of what is read, the decoder's of what is labelled."""
        assert batch.decoder_input_ids is not None
        written = batch.labels.ne(-100)
        domain = None if batch.domain is None else torch.where(written, batch.domain[:, :1], -1)
        self.encoder.hand(batch.token_mask, batch.input_ids, None, batch.domain)
        self.decoder.hand(written, batch.decoder_input_ids, None, domain)

    def losses(self, norm: str, over_ranks: bool = False) -> dict[str, Tensor]:
        """`balance` and `router_z`, each the mean over the sparse blocks of both stacks."""
        parts = [(len(one.layers), one.losses(norm, over_ranks)) for one in (self.encoder, self.decoder)]
        blocks = sum(count for count, found in parts if found)
        names = next((tuple(found) for _, found in parts if found), ())
        return {
            name: torch.stack([found[name] * (count / blocks) for count, found in parts if found]).sum()
            for name in names
        }

    def note(self, name: str, value: Tensor) -> None:
        self.terms.setdefault(name, []).append(value.detach())

    def clear(self) -> None:
        self._drop_rates()
        self.encoder.clear()
        self.decoder.clear()

    def reset_window(self) -> None:
        self.encoder.reset_window()
        self.decoder.reset_window()
        self.terms, self.router_grads = {}, []

    def _drop_rates(self) -> None:
        """What the routers have noted in their own stack's context is told for both together."""
        for one in (self.encoder, self.decoder):
            for name, values in one.terms.items():
                self.terms.setdefault(name, []).extend(values)
            one.terms = {}


class _RoutedSwitch(Routed):
    """Mixed into the family's router: logits from a copy of the input, and the family's answer of three tensors."""

    classifier: nn.Linear
    stored_capacity: int | None
    """While crafting is proven: the checkpoint's own capacity, which counts padding too."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, E) one-hot choice, zero where the slot is dropped; (B, S, 1) weights; (B, S, E) logits."""
        shape, settings, linear = hidden_states.shape[:-1], self.settings, self.classifier
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training and settings.jitter:
                x_TD = jitter(x_TD, settings.jitter)
            kind = torch.promote_types(linear.weight.dtype, torch.float32)
            bias = None if linear.bias is None else linear.bias.to(kind)
            logits_TE = functional.linear(x_TD.to(kind), linear.weight.to(kind), bias)
            p_TE = logits_TE.softmax(dim=-1)
            chosen_TK = p_TE.argmax(dim=-1, keepdim=True)
            routing = Routing(logits_TE, chosen_TK, p_TE.gather(1, chosen_TK))
        weights_TK = routing.gates
        if self.training or self.context.handed is not None:
            self.context.record(self.block, routing, self.num_experts, True)
        if self.training:
            weights_TK = self._thinned(routing)
        hot_TE = functional.one_hot(chosen_TK[:, 0], self.num_experts) * (weights_TK > 0)
        hot_BSE = hot_TE.view(*shape, -1)
        if self.stored_capacity is not None:
            hot_BSE = hot_BSE * (hot_BSE.cumsum(dim=-2) <= self.stored_capacity)
        return hot_BSE, weights_TK.to(hidden_states.dtype).view(*shape, 1), logits_TE.view(*shape, -1)


class _TwoOpeners:
    """A hook before a stack's forward that opens its context, with the mask of what was handed, or the stack's own."""

    def __init__(self, routes: PairedRoutes, reads: bool) -> None:
        self.routes, self.reads = routes, reads

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        from sparsmith.methods.wrapped import Opener

        Opener(self.routes.encoder if self.reads else self.routes.decoder)(stack, args, kwargs)


class _HandLabels:
    """A hook before the model's forward: a loop of another library that gives labels alone has the padding of its answers left out too."""

    def __init__(self, routes: PairedRoutes) -> None:
        self.routes = routes

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
        if not model.training or labels is None or ids is None:
            return
        fed = kwargs.get("decoder_input_ids")
        fed = model._shift_right(labels) if fed is None else fed
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.routes.hand(Batch(ids, labels, mask, decoder_input_ids=fed))


def graft(model: Any, config: UpcycleConfig) -> None:
    """Let the routers of both stacks train as the settings say, in place, and open their contexts with the stacks."""
    check(config)
    routes, first = PairedRoutes(), len(model.encoder.block)
    settings = RouterSettings("switch", False, config.moe.capacity_factor, config.moe.jitter)
    row = anatomy.anatomy_of(model)
    for index, ffn in sparse_blocks(model):
        router = ffn.router
        router.__class__ = mixed(_RoutedSwitch, cast(Any, type(router)))
        router.settings, router.block, router.top_k, router.stored_capacity = settings, index, 1, None
        object.__setattr__(router, "context", routes.encoder if index < first else routes.decoder)
        for module in (router, router.classifier, ffn.experts, *ffn.experts.modules()):
            module.sparsmith_grafted = True
        for expert in experts_of(ffn, row.experts).values():
            if config.moe.expert_dropout:
                expert.dropout.p = config.moe.expert_dropout
        if config.moe.trains_gate and not router.classifier.weight.is_meta:
            router.classifier.float()
    object.__setattr__(model, "sparsmith_routes", routes)
    model.encoder.register_forward_pre_hook(_TwoOpeners(routes, True), with_kwargs=True)
    model.decoder.register_forward_pre_hook(_TwoOpeners(routes, False), with_kwargs=True)
    model.register_forward_pre_hook(_HandLabels(routes), with_kwargs=True)
    model.register_forward_hook(
        AddLosses(cast(Any, routes), config.moe.loss_weights, config.moe.balance_norm), with_kwargs=True
    )
    model.router_aux_loss_coef = model.router_z_loss_coef = 0.0  # the library's own, where router logits are asked for


def settle(model: Any, config: UpcycleConfig) -> None:
    """The family's own classes and dropouts again, in place; its config says how a stock trainer would balance, and drops nothing."""
    for hooks in (model.encoder._forward_pre_hooks, model.decoder._forward_pre_hooks, model._forward_pre_hooks):
        for key in [key for key, one in hooks.items() if isinstance(one, (_TwoOpeners, _HandLabels))]:
            del hooks[key]
    unhook(model)
    for _, ffn in sparse_blocks(model):
        for name in ("stored_capacity", "top_k"):
            ffn.router.__dict__.pop(name, None)
        for module in (ffn.router.classifier, *ffn.experts.modules()):
            module.__dict__.pop("sparsmith_grafted", None)
        for expert in ffn.experts.values():
            expert.dropout.p = model.config.dropout_rate
        ffn.router.expert_capacity = UNBOUNDED
    ungraft(model)
    model.__dict__.pop("sparsmith_routes", None)
    for one in (model, model.encoder, model.decoder):
        one.config.expert_capacity = UNBOUNDED
    for name, value in (("router_aux_loss_coef", config.moe.balance_coef), ("router_z_loss_coef", config.moe.z_coef)):
        setattr(model, name, value)
        setattr(model.config, name, value)


def routes_of(model: Any) -> PairedRoutes:
    """The contexts of a grafted model."""
    return model.sparsmith_routes


def router_grads(model: Any) -> list[Tensor]:
    """Gradients of the routers' weights, of those that have one."""
    found = (ffn.router.classifier.weight.grad for _, ffn in sparse_blocks(model))
    return [grad for grad in found if grad is not None]


@contextmanager
def as_stored(model: Any) -> Iterator[None]:
    """The checkpoint's own capacity, padding counted, while crafting is held against the model as it came."""
    routers = [ffn.router for _, ffn in sparse_blocks(model)]
    for router in routers:
        router.stored_capacity = router.expert_capacity
    try:
        yield
    finally:
        for router in routers:
            router.stored_capacity = None


def check(config: UpcycleConfig) -> None:
    """Refuse what the family cannot do.

    Raises:
        MethodError: names the setting.
    """
    moe = config.moe
    if moe.router != "top1":
        mend = "Write `moe: {router: top1, combine: switch}`."
        raise MethodError("upcycle.moe.router", f"`{moe.router}`", "`top1`, which Switch was trained by", mend)
    if moe.how != "switch":
        found, mend = f"`{moe.how}`", "Write `moe: {router: top1, combine: switch}`."
        raise MethodError("upcycle.moe.combine", found, "`switch`: the family weighs by the raw probability", mend)
    if config.tune == "lora":
        found = "`lora` on SwitchTransformers, whose experts are linears of their own and not stacked"
        raise MethodError("upcycle.tune", found, "`full`", "Leave `tune` out.")
    if moe.changed("experts_impl"):
        found = f"`{moe.experts_impl}`, which has no effect on SwitchTransformers: it runs one expert after the other"
        raise MethodError("upcycle.moe.experts_impl", found, "nothing", "Remove `moe.experts_impl`.")


CAUTION = (
    "`expert_capacity` was absolute in the checkpoint (64 as published) and would have dropped tokens in silence where an expert was asked "
    f"for more in a row. Tuned and measured without drops in evaluation; here it is {UNBOUNDED:,}, above any row, so nothing is dropped. "
    "The library counts up to it and allocates nothing by it; a runtime that does needs it lowered to its longest row."
)
