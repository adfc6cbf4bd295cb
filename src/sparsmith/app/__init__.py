"""The verbs as functions: recipe + method + data + tuner put together. The only floor that knows all parts.

Every function here is what one CLI verb calls; all take plain paths and return data.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# no module here bears a verb's name: importing it would put the module in the place of the function
_HOMES = {
    "load_recipe": "sparsmith.app.recipes",
    "plan": "sparsmith.app.recipes",
    "data_show": "sparsmith.app.recipes",
    "data_overlap": "sparsmith.app.meeting",
    "tune": "sparsmith.app.tuning",
    "evaluate": "sparsmith.app.use",
    "evaluate_apart": "sparsmith.app.meeting",
    "evaluate_tasks": "sparsmith.app.use",
    "generate": "sparsmith.app.use",
    "export": "sparsmith.app.use",
    "convert": "sparsmith.app.converting",
    "report": "sparsmith.app.use",
    "verify": "sparsmith.app.use",
    "import_camelidae": "sparsmith.app.use",
    "bench": "sparsmith.app.benching",
    "demo": "sparsmith.app.demonstration",
    "protocol": "sparsmith.app.comparison",
    "doctor": "sparsmith.app.checkup",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsmith.app' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
