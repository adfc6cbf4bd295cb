"""sparsmith: one dense checkpoint in; a sparse, slim or elastic model out, crafted while it is instruction-tuned.

The face of the library. Every name is loaded when it is first used, so that `import sparsmith` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sparsmith import auto

__version__ = "0.1.0"

auto.install()  # transformers' Auto classes will know our architectures; imports nothing now

_HOMES = {
    "craft": "sparsmith.crafting.apply",
    "convert": "sparsmith.exporting",
    "load_base": "sparsmith.crafting.base_model",
    "plan": "sparsmith.crafting.plan_stages",
    "save": "sparsmith.crafting.checkpoint",
    "load": "sparsmith.crafting.checkpoint",
    "settle": "sparsmith.crafting.settle",
    "export": "sparsmith.exporting",
    "generate": "sparsmith.inference",
    "Tuner": "sparsmith.training",
    "evaluate": "sparsmith.evaluating",
    "evaluate_tasks": "sparsmith.evaluating",
    "load_recipe": "sparsmith.app",
    "tune": "sparsmith.app",
    "data_overlap": "sparsmith.app",
    "PescConfig": "sparsmith.methods.pesc.config",
    "UpcycleConfig": "sparsmith.methods.upcycle.config",
    "FineGatesConfig": "sparsmith.methods.finegates.config",
    "SoftConfig": "sparsmith.methods.soft.config",
    "SparsmithError": "sparsmith.errors",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsmith' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
