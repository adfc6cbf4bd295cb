"""`import sparsmith` makes transformers' Auto classes know our architectures, without importing torch or transformers.

Two modules are watched by a finder at the head of `sys.meta_path` (a dozen lines; the alternative, wrapt's post-import
hooks, would be a dependency for this alone, and registering needs a further trick anyway):

* transformers' `configuration_auto`: once it is there, a stand-in is registered for each of our model types. The
stand-in imports
  nothing; the real class is imported when a checkpoint of ours is opened. Importing it at once would fail, because the
  watched module may be imported from the middle of others that our classes need.
* our modelling modules: once there, their real classes are registered in place of the stand-in.

Nothing of transformers is replaced or patched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

# model type -> (module, config class, causal LM class)
MODEL_TYPES: dict[str, tuple[str, str, str]] = {
    "sparsmith_slim": ("sparsmith.methods.finegates.modeling", "SparsmithSlimConfig", "SparsmithSlimForCausalLM"),
    "sparsmith_pesc": ("sparsmith.methods.pesc.modeling", "SparsmithPescConfig", "SparsmithPescForCausalLM"),
    "sparsmith_ec": ("sparsmith.methods.upcycle.modeling", "SparsmithEcConfig", "SparsmithEcForCausalLM"),
}
_CONFIGS = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Start watching. Calling it twice does nothing more."""
    if any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Watcher())
    loaded = sys.modules.get(_CONFIGS)
    if loaded is not None and hasattr(loaded, "AutoConfig"):
        _register_stand_ins()
    for module in {row[0] for row in MODEL_TYPES.values()}:
        if module in sys.modules:
            _register_classes(module)


def real_class(model_type: str) -> type | None:
    """The causal LM class of one of our model types (imported now), else None."""
    row = MODEL_TYPES.get(model_type)
    return getattr(importlib.import_module(row[0]), row[2]) if row else None


def _register_stand_ins() -> None:
    configs: Any = sys.modules[_CONFIGS]
    for model_type in MODEL_TYPES:
        if model_type not in configs.CONFIG_MAPPING:
            configs.AutoConfig.register(model_type, _stand_in(model_type))


def _stand_in(model_type: str) -> type:
    """A class that becomes the real config class as soon as it is asked for anything."""

    def real() -> Any:
        module, name, _ = MODEL_TYPES[model_type]
        return getattr(importlib.import_module(module), name)

    class StandIn:
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return real().from_pretrained(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return real().from_dict(*args, **kwargs)

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real()(*args, **kwargs)

    StandIn.__name__ = StandIn.__qualname__ = MODEL_TYPES[model_type][1]
    return StandIn


def _register_classes(module_name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    module = sys.modules[module_name]
    for model_type, (home, config_name, model_name) in MODEL_TYPES.items():
        if home == module_name:
            config_class = getattr(module, config_name)
            AutoConfig.register(model_type, config_class, exist_ok=True)
            AutoModelForCausalLM.register(config_class, getattr(module, model_name), exist_ok=True)


class _Watcher(MetaPathFinder):
    """Finds nothing itself: it wraps the loader of a watched module so that we hear when the module is complete."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        ours = fullname != _CONFIGS
        if self.asking or (ours and fullname not in {row[0] for row in MODEL_TYPES.values()}):
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader, fullname)
        return spec


class _Announcing(Loader):
    def __init__(self, loader: Any, fullname: str) -> None:
        self.loader, self.fullname = loader, fullname

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for inspect
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.fullname == _CONFIGS:
            _register_stand_ins()
        else:
            _register_classes(self.fullname)
