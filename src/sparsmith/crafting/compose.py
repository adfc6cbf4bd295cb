"""Which methods go together, in which order. What a pair cannot do is said by the methods themselves (`Method.conflicts`)."""

from __future__ import annotations

from collections.abc import Sequence

from sparsmith.errors import MethodError
from sparsmith.methods import registry
from sparsmith.methods.base import MethodConfig


def check_composition(configs: Sequence[MethodConfig]) -> None:
    """Refuse, by name, an empty list, a method twice, a pair in conflict, and two owners of the task loss."""
    if not configs:
        raise MethodError(
            "methods", "an empty list", "at least one method", "Known: " + ", ".join(registry.names()) + "."
        )
    methods = [registry.of(config) for config in configs]
    names = [method.name for method in methods]
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
    owners = [method.name for method in methods if method.owns_objective]
    if len(owners) > 1:
        raise MethodError(
            "methods", " and ".join(owners), "at most one method that owns the task loss", "Drop one of them."
        )
