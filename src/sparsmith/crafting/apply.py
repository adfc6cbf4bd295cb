"""Craft: change the structure of a dense model, all or nothing, and prove that its function stayed the same.

Order (PESC §2.3 and our spec 4.1): every method grafts its modules in the listed order; LoRA is injected once through PEFT; then the
trained set is fixed to exactly what the methods name, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.anatomy.four_bit import hold_as_read
from sparsmith.crafting.compose import check_base, check_composition
from sparsmith.crafting.lora import inject_lora, lora_parameters
from sparsmith.crafting.lora_count import adapts_experts, merged_settings
from sparsmith.crafting.neutral import compare_probe, probe_logits
from sparsmith.crafting.record import CraftRecord, attach, base_of, record_of
from sparsmith.errors import EmptyRole, MethodError
from sparsmith.methods.base import CraftContext, MethodConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RoleTable = dict[str, list[tuple[str, nn.Parameter]]]


def craft(
    model: PreTrainedModel,
    config: MethodConfig | Sequence[MethodConfig],
    *,
    inplace: bool = False,
    seed: int = 42,
    proof: bool = True,
) -> PreTrainedModel:
    """Craft `model` by one method or by several in order.

    Args:
        model: the dense base; left untouched unless `inplace`.
        config: a method's config, or a list of them (composition).
        inplace: reuse the modules of `model` instead of a copy.
        seed: the run's seed; new weights are drawn from named streams of it.
        proof: compare the logits before and after on a probe batch.

    Returns:
        The crafted model (an object of another class where the method needs one), ready to train: exactly the tensors of the
        methods' roles have `requires_grad`.

    Raises:
        MethodError: a composition or setting that cannot work.
        ProofError: the crafted model computes something else.
    """
    configs = (config,) if isinstance(config, MethodConfig) else tuple(config)
    task = anatomy.task_of(model)
    check_composition(configs, task)
    base = base_of(model)
    context = CraftContext(seed=seed, base_id=base.id)
    if not inplace:
        model = copy.deepcopy(model)
    record = CraftRecord(configs=configs, base=base, seed=seed)
    check_base(record.parts, model.config)
    hold_as_read(model)
    with _all_or_nothing(model):
        if task == anatomy.SEQ_CLS:
            anatomy.widen_classifier(model)
        if task != anatomy.CAUSAL_LM:  # a config tells its task by this
            model.config.architectures = [type(model).__name__]
        before = probe_logits(model, seed) if proof else None
        model.requires_grad_(False)
        crafted: Any = model
        for method, settings in record.parts:
            crafted = method.craft(crafted, settings, context)
        lora = merged_settings(record.parts, anatomy.shape_of(crafted))
        if lora is not None:
            inject_lora(crafted, lora, seed, adapts_experts(record.parts))
        attach(crafted, record)
        _fix_trained_set(crafted)
        if before is not None:
            shifts = "; ".join(filter(None, (method.shifts(settings) for method, settings in record.parts)))
            limit = max(method.rounding for method, _ in record.parts)
            with ExitStack() as stack:
                for method, settings in record.parts:
                    stack.enter_context(method.while_proven(crafted, settings))
                neutral = compare_probe(crafted, before, seed, limit=limit, shifts=shifts)
            attach(crafted, CraftRecord(configs=configs, base=base, seed=seed, neutral=neutral))
    return crafted


def trained_roles(model: nn.Module) -> RoleTable:
    """Every trained tensor by role, with its name in the crafted model; LoRA is the role `lora`."""
    table: RoleTable = {}
    for method, config in record_of(model).parts:
        for role, tensors in method.roles(model, config).items():
            table.setdefault(role, []).extend(tensors)
    lora = lora_parameters(model)
    if lora:
        table["lora"] = lora
    return table


def wanted_roles(model: nn.Module) -> tuple[str, ...]:
    """The roles that the configs ask for."""
    parts = record_of(model).parts
    roles = [role for method, config in parts for role in method.wanted_roles(config)]
    if merged_settings(parts, anatomy.shape_of(model)) is not None:
        roles.append("lora")
    return tuple(dict.fromkeys(roles))


def check_roles(model: nn.Module) -> dict[str, int]:
    """Parameters by role; a role that is asked for and empty stops here.

    Raises:
        EmptyRole: names the role.
    """
    counts = {role: sum(p.numel() for _, p in tensors) for role, tensors in trained_roles(model).items()}
    for role in wanted_roles(model):
        if not counts.get(role):
            raise EmptyRole(
                f"role {role}", "no trained tensor", "at least one", "Check `layers`, `lora.targets` and the model."
            )
    return counts


def _fix_trained_set(model: nn.Module) -> None:
    """Exactly the role tensors train, in float32 (masters of a bf16 base: small updates must not round away)."""
    model.requires_grad_(False)
    for role, tensors in trained_roles(model).items():
        for name, parameter in tensors:
            if parameter.device.type != "meta" and parameter.dtype != torch.float32:
                raise MethodError(
                    f"{role} {name}", str(parameter.dtype), "float32", "A trained tensor must be float32."
                )
            parameter.requires_grad_(True)
    check_roles(model)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put a model back when crafting fails half-way: modules, tensor slots, hooks, attributes, `requires_grad` flags and settings."""
    holders: list[Any] = list(model.modules())
    settings = [vars(model)[name] for name in ("config", "generation_config") if vars(model).get(name) is not None]
    # crafting nests and reads the settings' values and may write into them; modules and tensors are put back as objects
    before = [(one, _shallow(vars(one))) for one in holders] + [(one, copy.deepcopy(vars(one))) for one in settings]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for one, attributes in before:
            _put_back(vars(one), attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


class _Filled(NamedTuple):
    """A dictionary and what it held."""

    dictionary: dict[str, Any]
    content: dict[str, Any]


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with the contents of those that are dictionaries (children, tensors, hooks)."""
    return {name: _Filled(v, dict(v)) if isinstance(v, dict) else v for name, v in attributes.items()}


def _put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Fill the same dictionaries again: a hook's handle holds on to the one that it was put into."""
    attributes.clear()
    for name, value in before.items():
        if isinstance(value, _Filled):
            value.dictionary.clear()
            value.dictionary.update(value.content)
            value = value.dictionary
        attributes[name] = value
