"""The list of methods. A method is a value here, and nowhere else a name to branch on."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from sparsmith.errors import MethodError, nearest
from sparsmith.methods.base import Method, MethodConfig

# name -> "module:attribute" of the method and of its settings; loaded when first asked for, because layers import torch
_BUILT_IN: dict[str, tuple[str, str]] = {
    "pesc": ("sparsmith.methods.pesc.method:PESC", "sparsmith.methods.pesc.config:PescConfig"),
    "upcycle": ("sparsmith.methods.upcycle.method:UPCYCLE", "sparsmith.methods.upcycle.config:UpcycleConfig"),
    "finegates": (
        "sparsmith.methods.finegates.method:FINEGATES",
        "sparsmith.methods.finegates.config:FineGatesConfig",
    ),
    "soft": ("sparsmith.methods.soft.method:SOFT", "sparsmith.methods.soft.config:SoftConfig"),
}
_EXTRA: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method from outside (a plug-in, a test). A name that is taken is an error."""
    if method.name in _BUILT_IN or (method.name in _EXTRA and _EXTRA[method.name] is not method):
        raise MethodError(f"method {method.name}", "a name that is taken", "a new name", "Rename the method.")
    _EXTRA[method.name] = method
    return method


def unregister(name: str) -> None:
    """Take back what `register` added."""
    _EXTRA.pop(name, None)


def names() -> tuple[str, ...]:
    return (*_BUILT_IN, *_EXTRA)


@cache
def _load(home: str) -> Any:
    module, attribute = home.split(":")
    return getattr(import_module(module), attribute)


def get(name: str) -> Method:
    """The method of that name."""
    if name in _EXTRA:
        return _EXTRA[name]
    if name not in _BUILT_IN:
        raise MethodError("methods", f"`{name}`", "a known method", nearest(name, names()))
    return _load(_BUILT_IN[name][0])


def of(config: MethodConfig) -> Method:
    """The method that a config belongs to."""
    return get(config.method)


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks of a method, as its settings say: without its layers, so without torch."""
    return _EXTRA[name].tasks if name in _EXTRA else config_classes()[name].tasks


def config_classes() -> dict[str, type[MethodConfig]]:
    """Method name -> config class, for the recipe loader. Loads no layers, so no torch."""
    built_in = {name: _load(config) for name, (_, config) in _BUILT_IN.items()}
    return built_in | {name: method.config_class for name, method in _EXTRA.items()}
