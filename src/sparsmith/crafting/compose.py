"""Which methods go together, in which order. What a pair cannot do is said by the methods themselves (`Method.conflicts`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsmith.anatomy import is_sparse, refuse_sparse
from sparsmith.anatomy.rows import base_config
from sparsmith.errors import MethodError
from sparsmith.methods import registry
from sparsmith.methods.base import LoraSettings, Method, MethodConfig

_SPARED = {"upcycle": "upcycle.moe.freeze_dense to true: routers and experts are then its part, the rest the other's"}
"""Method -> how it leaves the base's own weights to another."""


def check_composition(configs: Sequence[MethodConfig], task: str = "causal_lm") -> None:
    """Refuse, by name, an empty list, a method that does not do the task, a method twice, a pair in conflict, and two owners of the task
    loss."""
    if not configs:
        raise MethodError(
            "methods", "an empty list", "at least one method", "Known: " + ", ".join(registry.names()) + "."
        )
    methods = [registry.of(config) for config in configs]
    names = [method.name for method in methods]
    _check_task(methods, task)
    for name in names:
        if names.count(name) > 1:
            raise MethodError("methods", f"`{name}` twice", "each method once", "Use stages to apply a method again.")
    for method in methods:
        for other in names:
            if other in method.conflicts:
                raise MethodError(
                    "methods",
                    f"`{method.name}` with `{other}`",
                    "methods that can be combined",
                    method.conflicts[other],
                )
    _check_lora(list(zip(methods, configs)))
    _check_alone(list(zip(methods, configs)))
    whole = [method.name for method, config in zip(methods, configs) if method.trains_base(config)]
    if len(whole) > 1:
        raise MethodError(
            "methods",
            f"`{whole[0]}` and `{whole[1]}`, which both train the base's own weights",
            "one that does",
            f"Set {_SPARED.get(whole[0], whole[0] + ' to train its own parts alone')}.",
        )
    owners = [method.name for method in methods if method.owns_objective]
    if len(owners) > 1:
        raise MethodError(
            "methods", " and ".join(owners), "at most one method that owns the task loss", "Drop one of them."
        )


def check_base(methods: Sequence[tuple[Method, MethodConfig]], config: Any) -> None:
    """Refuse a base, or what an earlier method of the list has made of it, that a method cannot shape.

    Args:
        config: the base's transformers config.

    Raises:
        UnsupportedAnatomy: a mixture of experts where a dense model is shaped. MethodError: the other way round, or routers that nothing
            trains.
    """
    for method, settings in methods:
        sparse, taken = is_sparse(config), method.takes(settings)
        if sparse and taken == "dense":
            refuse_sparse(config, method.name)
        if not sparse and taken == "sparse":
            raise MethodError(
                f"methods: {method.name}",
                f"a dense model (model_type {base_config(config).model_type})",
                "a mixture of experts, as donor is sparse",
                "Leave `donor` out to make one of it.",
            )
        config = method.crafted_config(settings, config)
    if is_sparse(config) and not any(method.tunes_routers(settings) for method, settings in methods):
        raise MethodError(
            "methods",
            f"a mixture of experts (model_type {base_config(config).model_type}) whose routers no method tunes",
            "a method that does, with its losses",
            "Put {method: upcycle, donor: sparse} first in the list.",
        )


def _check_task(methods: Sequence[Method], task: str) -> None:
    for method in methods:
        if task not in method.tasks:
            doing = [name for name in registry.names() if task in registry.get(name).tasks]
            raise MethodError(
                "methods",
                f"`{method.name}`, which does {' and '.join(method.tasks)}, for the task {task}",
                f"a method that does {task}",
                f"Methods that do: {', '.join(doing)}." if doing else "No installed method does; use causal_lm.",
            )


def _check_alone(parts: Sequence[tuple[Method, MethodConfig]]) -> None:
    """A method whose loss reaches its own tensors only leaves nothing for another to train; some settings go with no other method."""
    for method, config in parts:
        untrained, single = method.trains_alone(config), method.goes_alone(config)
        if (untrained or single) and len(parts) > 1:
            other = next(one.name for one, _ in parts if one is not method)
            way, mend = "other settings", f"Drop `{other}`, or change that setting."
            if untrained:
                way = "a trunk that trains"
                mend = f"Tune `{other}` first and go on from its export, or let `{method.name}` train the trunk."
            raise MethodError(
                "methods",
                f"`{other}` beside `{method.name}` with {untrained or single}",
                f"`{method.name}` alone, or with {way}",
                mend,
            )


def _check_lora(parts: Sequence[tuple[Method, MethodConfig]]) -> None:
    """A LoRA on linears that are trained themselves would have no purpose."""
    whole = [method.name for method, config in parts if method.trains_base(config)]
    asking = [method.name for method, config in parts if (lora := _lora(method, config)) is not None and lora.enabled]
    if whole and asking:
        raise MethodError(
            "methods",
            f"a LoRA asked for by `{asking[0]}` where `{whole[0]}` trains the linears themselves",
            "one of the two",
            f"Set {asking[0]}.lora.enabled to false, or {whole[0]}.tune to lora.",
        )


def _lora(method: Method, config: MethodConfig) -> LoraSettings | None:
    settings = getattr(config, "lora", None)
    asked = isinstance(settings, LoraSettings) and method.asks_lora(config) and not method.trains_base(config)
    return settings if asked else None
