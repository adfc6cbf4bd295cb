"""Promise 11: crafting is all or nothing: however far it came before it failed, the model that was handed in is as before."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import torch
from torch import nn

import sparsmith as sm
from sparsmith.seeds import numpy_generator
from tests.kit.cases import FEW_FAMILIES, FEW_METHODS, Configs, base_for, cases, logits
from tests.kit.tally import Tally

HOMES = tuple(str(Path(str(package.__file__)).parent) for package in (sm, peft))
"""A step of crafting is the beginning or the end of any call of a function of ours or of PEFT."""


class Planted(Exception):
    """The failure that the trial plants."""


class Steps:
    """Counts the steps of what runs inside it, and fails at one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.places = fail_at, list[str]()

    def __enter__(self) -> Steps:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(HOMES) or frame.f_code.co_flags & 0x20:  # generators end in odd ways
            return None
        self._step(frame, event)
        frame.f_trace_lines = False
        return self._inside

    def _inside(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event == "return":
            self._step(frame, event)
        return self._inside

    def _step(self, frame: FrameType, event: str) -> None:
        self.places.append(f"{event} of {frame.f_code.co_qualname}")
        if len(self.places) == self.fail_at:
            sys.settrace(None)
            raise Planted(self.places[-1])


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that crafting could leave changed."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"{name}: module"] = (id(module), type(module).__name__, module.training)
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            # a dict's keys tell of children, tensors and hooks; the rest by its identity
            seen[f"{name}: {key}"] = (
                value if plain else sorted(map(str, value)) if isinstance(value, dict) else id(value)
            )
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        raw = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        # equal ids under several names are a tie
        seen[f"{name}: tensor"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, str(tensor.dtype), raw)
    for name in ("config", "generation_config"):
        seen[name] = json.dumps(getattr(model, name).to_dict(), sort_keys=True, default=str)
    seen["hidden settings"] = {k: str(v) for k, v in vars(model.config).items()}
    return seen


def model_for(family: str, config: Configs = ()) -> Any:
    """A base with its own frozen set, so that putting back is not just switching everything on."""
    model = base_for(config, family)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    return model


def steps_of(config: Configs, family: str) -> list[str]:
    """Every step of crafting that can fail, by its place; where `craft` returns, it has succeeded."""
    for _ in range(2):  # the first time fills caches, and has steps that no other has
        model = model_for(family, config)
        with Steps() as steps:
            sm.craft(model, config, inplace=True)
    assert steps.places[-1] == "return of craft"
    return steps.places[:-1]


def failed_at(config: Configs, family: str, step: int) -> tuple[list[str], Any]:
    """Craft, failing at `step`, from 1. Returns what is not as before, and the model."""
    model = model_for(family, config)
    before = picture(model)
    try:
        with Steps(step):
            sm.craft(model, config, inplace=True)
    except Planted:
        return differences(before, picture(model)), model
    return ["it did not fail"], model


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def run(folder: Path) -> Tally:
    """At full size: every place of crafting on three families that differ in their tensors, and draws on all."""
    tally = trial(cases(("pesc", "soft LoRA", "soft, frozen trunk"), FEW_FAMILIES))
    tally.add(trial(cases(FEW_METHODS), draws=20))
    return tally


def trial(of: Iterable[tuple[str, Configs, str]] | None = None, draws: int | None = None) -> Tally:
    """Fail once at every place where crafting has a step (at one of its steps there), or at `draws` steps of all; some of the models are
    then crafted again, which must give what it always gives."""
    tally, every = Tally(), 0
    for what, config, family in of if of is not None else cases():
        places = steps_of(config, family)
        every += len(places)
        stream = numpy_generator(11, what)
        order = [int(index) for index in stream.permutation(len(places))]
        chosen = order[:draws] if draws is not None else list({places[index]: index for index in order}.values())
        wanted = logits(sm.craft(model_for(family, config), config, proof=False))
        for number, index in enumerate(chosen):
            changed, model = failed_at(config, family, index + 1)
            if not changed and number % 20 == 0:
                again = logits(sm.craft(model, config, inplace=True))
                changed = [f"crafted again: {name}" for name in wanted if not torch.equal(again[name], wanted[name])]
            tally.case(not changed, f"{what}, step {index + 1} ({places[index]}): {changed[:3]} of {len(changed)}")
    tally.figures["steps of all these craftings"] = every
    return tally
