"""Settle: make soft choices hard. Every method settles its own part; then the LoRA is merged into the weights it was
trained on.

A LoRA that was trained on an NF4 base has learned around that base's rounding errors. It is therefore added to the
*dequantised* NF4 weights, in float32, and the sum is rounded once; the original weights are refused (PESC §2.3 trains
on NF4; the released merge adds to the original bf16 weights, which serves another function than the trained one).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsmith import anatomy
from sparsmith.anatomy.four_bit import quantised_linears
from sparsmith.crafting.lora import ADAPTER
from sparsmith.crafting.neutral import probe_logits
from sparsmith.crafting.record import CraftRecord, attach, record_of
from sparsmith.crafting.tensors import check_finite
from sparsmith.errors import LayoutMismatch, MethodError, ProofError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SETTLED = "sparsmith_settled"
# Merging replaces x W + (x A) B by x (W + A B): equal up to the rounding of the type that the sum is stored in.
_PRUNED_WIDE = 1e-6  # of float64 models: Gemma's norms, which a sub-block's gate is folded into, compute in float32
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class MergedMatrix:
    """One weight that took up its LoRA."""

    name: str
    relative_error: float
    """|stored - exact| / |exact| (Frobenius): what rounding to the stored type costs."""
    lora_share: float
    """|B A| / |W|: how large the merged change is."""


@dataclass(frozen=True)
class Drift:
    """Two models on the probe batch."""

    max_logit_difference: float
    largest_logit: float
    mean_kl: float
    """Mean over tokens of KL(before || after), nats."""


@dataclass(frozen=True)
class SettleReport:
    """What settling has done, and what it cost."""

    merged: tuple[MergedMatrix, ...] = ()
    dequantised: int = 0
    """Weights that came from NF4."""
    merge: Drift | None = None
    """Unmerged (on dequantised weights) against merged."""
    dequantise: Drift | None = None
    """NF4 kernels (bf16 compute) against the dequantised weights: the part that is not the merge's."""
    removed: int = 0
    """Parameters that were deleted."""
    prune: Drift | None = None
    """Closed units held at 0 against the model without them."""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method -> what it has to say of the settled model (`Method.tables`): accounting, histograms."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def settle(
    model: PreTrainedModel,
    *,
    onto: Literal["dequantised", "original"] = "dequantised",
    dtype: torch.dtype | None = None,
    seed: int = 42,
    form: str = "auto",
) -> PreTrainedModel:
    """Settle every method, merge the LoRA, then delete what is closed, in place. `settle_report(model)` tells the figures.

    Args:
        model: a crafted model.
        onto: for an NF4 base, which weights take the LoRA; `original` is refused, with the reason.
        dtype: number type of dequantised weights; default: the base's own.
        seed: of the probe batch.
        form: of a method that deletes parts, what is left: one of `methods.base.FORMS`.

    Raises:
        MethodError: `onto="original"` for a quantised base; a LoRA variant that cannot be merged.
        LayoutMismatch: a form that the model cannot take, or not any more.
        ProofError: the merged model computes something else than the unmerged one.
    """
    record = record_of(model)
    if is_settled(model):
        refuse_other_form(model, form)
        return model
    if onto != "dequantised" and quantised_linears(model):
        raise MethodError(
            "settle",
            "the original weights as target of the merge",
            "the dequantised weights",
            "The LoRA was trained around the NF4 rounding errors: on the original weights it is another function.",
        )
    check_finite("settle", {name: p for name, p in model.named_parameters() if p.requires_grad})
    settled: nn.Module = model
    for method, config in record.parts:
        settled = method.settle(settled, config)
    settled = cast("PreTrainedModel", settled)
    if record.base.task == anatomy.SEQ_CLS:
        anatomy.narrow_classifier(settled, getattr(torch, record.base.dtype))
    chosen = _form_of(settled, record, form)
    before = probe_logits(settled, seed)
    count = dequantise(settled, dtype or getattr(torch, record.base.dtype))
    middle = probe_logits(settled, seed) if count else before
    merged = merge_lora(settled)
    after = probe_logits(settled, seed) if merged else middle
    held, tables = _count(settled), {}
    for method, config in record.parts if chosen else ():
        tables[method.name] = method.tables(settled, config, chosen)
        settled = cast("PreTrainedModel", method.prune(settled, config, chosen))
    removed = held - _count(settled)
    report = SettleReport(
        merged=merged,
        dequantised=count,
        merge=_drift(middle, after) if merged else None,
        dequantise=_drift(before, middle) if count else None,
        removed=removed,
        prune=_drift(after, probe_logits(settled, seed)) if chosen else None,
        tables={name: table for name, table in tables.items() if table},
    )
    for drift, what in ((report.merge, "the LoRA is merged"), (report.prune, "closed units are deleted")):
        _check(drift, what, settled, _PRUNED_WIDE if drift is report.prune else 0.0)
    attach(settled, replace(record, form=chosen or None))
    object.__setattr__(settled, _SETTLED, report)
    return settled


def settled_copy(model: PreTrainedModel, form: str = "auto") -> PreTrainedModel:
    """`settle` of a copy, for saving in the middle of a run."""
    return settle(copy.deepcopy(model), form=form)


def refuse_other_form(model: nn.Module, form: str) -> None:
    """A settled model keeps the form that it has.

    Raises:
        LayoutMismatch: another one is asked for.
    """
    has = record_of(model).form
    if form not in ("auto", has):
        found = (
            f"a model that was settled into the form {has}" if has else "a settled model from which nothing was deleted"
        )
        raise LayoutMismatch(
            f"form {form}", found, "a model that is not settled yet", "Settle the delta checkpoint again."
        )


def _form_of(model: nn.Module, record: CraftRecord, form: str) -> str:
    """What the form asked for means here; empty where no method deletes anything."""
    found = next(filter(None, (method.form(model, config, form) for method, config in record.parts)), "")
    if not found and form != "auto":
        names = ", ".join(method.name for method, _ in record.parts)
        raise LayoutMismatch(
            f"form {form}", f"{names}, which deletes nothing", "a method that does", "Leave the form out."
        )
    return found


def _count(model: nn.Module) -> int:
    """Parameters, tied ones once, without those of modules that stand in the model only until it is settled."""
    passing = {id(p) for m in model.modules() if getattr(m, "sparsmith_grafted", False) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in passing)


def is_settled(model: nn.Module) -> bool:
    return getattr(model, _SETTLED, None) is not None


def settle_report(model: nn.Module) -> SettleReport | None:
    """The figures of `settle`, or None for a model that is not settled."""
    return getattr(model, _SETTLED, None)


def mark_settled(model: nn.Module, tables: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """For a model that was read from a settled checkpoint, with the tables that lie beside it."""
    object.__setattr__(model, _SETTLED, SettleReport(tables=dict(tables or {})))


@torch.no_grad()
def dequantise(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace every 4-bit linear by a plain one that holds the dequantised weights; returns how many."""
    found = quantised_linears(model)
    if not found:
        return 0
    import bitsandbytes.functional as bnb

    for name, module in found:
        weight = cast(Any, module.weight)
        rows, columns = weight.quant_state.shape
        plain = nn.Linear(columns, rows, bias=module.bias is not None, device="meta")
        full = bnb.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32).to(dtype)
        plain.weight = nn.Parameter(full.reshape(plain.weight.shape), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(cast(Tensor, module.bias).detach().to(dtype), requires_grad=False)
        _put(model, name, plain)
    _forget_quantisation(model)
    return len(found)


@torch.no_grad()
def merge_lora(model: nn.Module) -> tuple[MergedMatrix, ...]:
    """Add every LoRA to its weight in float32, round once, and take the LoRA modules out.

    PEFT's own merge rounds the product to the weight's type before it adds; this rounds the sum only.
    """
    from peft.tuners.lora import LoraLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    rows, places = [], []
    for name, layer in layers:
        if layer.lora_variant or any(layer.lora_bias.values()) or layer.merged:
            raise MethodError(
                name,
                "a LoRA variant, a LoRA bias or a merged LoRA",
                "a plain LoRA",
                "Merge this model with PEFT itself.",
            )
        inner = layer.get_base_layer()
        rows.append(_merge_one(name, layer, inner))
        if not isinstance(
            model.get_submodule(name.rpartition(".")[0]), LoraLayer
        ):  # of nested ones the outermost gives its place
            places.append((name, inner))
    for name, inner in places:
        _put(model, name, inner)
    if layers:
        _forget_lora(model)
    return tuple(rows)


def _merge_one(name: str, layer: Any, module: nn.Module) -> MergedMatrix:
    """Merge into `module`'s weight, or into the stacked tensor that the layer adapts, one expert at a time."""
    own = getattr(layer, "parameter_name", "weight")
    if own != "weight":
        name = f"{name.removesuffix('.base_layer')}.{own}"
    weight = cast(Tensor, getattr(module, own))
    wide = torch.promote_types(weight.dtype, torch.float32)
    stored = torch.empty_like(weight)
    error, exact_norm, change_norm, weight_norm = (0.0,) * 4  # squared
    for old, new, change in zip(_slices(weight), _slices(stored), _changes(layer, weight.dim(), wide), strict=True):
        exact = old.to(wide) + change
        new.copy_(exact)
        error += (new.to(wide) - exact).norm().item() ** 2
        exact_norm += exact.norm().item() ** 2
        change_norm += change.norm().item() ** 2
        weight_norm += old.to(wide).norm().item() ** 2
    check_finite("merge", {name: stored})
    setattr(module, own, nn.Parameter(stored, requires_grad=False))
    tiny = torch.finfo(wide).tiny
    return MergedMatrix(name, math.sqrt(error / max(exact_norm, tiny)), math.sqrt(change_norm / max(weight_norm, tiny)))


def _slices(weight: Tensor) -> Sequence[Tensor]:
    """The matrices of a weight: itself, or of a stacked one (E, out, in) those of the experts."""
    return weight.unbind(0) if weight.dim() == 3 else (weight,)


def _changes(layer: Any, dimensions: int, wide: torch.dtype) -> Iterator[Tensor]:
    """scale * B A of every matrix. Stacked factors lie as A (E r, in), expert after expert, and as B (out, r E), where an expert has every
    E-th column."""
    if dimensions == 2:
        yield layer.get_delta_weight(ADAPTER).to(wide)
        return
    a, b = (side[ADAPTER].weight.to(wide) for side in (layer.lora_A, layer.lora_B))
    experts, rank = layer.num_experts, layer.r[ADAPTER]
    for expert in range(experts):
        yield layer.scaling[ADAPTER] * (b[:, expert::experts] @ a[expert * rank : (expert + 1) * rank])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _forget_lora(model: nn.Module) -> None:
    """transformers saves adapters alone while it believes that there are any."""
    for part in model.modules():
        if getattr(part, "_hf_peft_config_loaded", False):
            part._hf_peft_config_loaded = False  # type: ignore[assignment]
        if "peft_config" in vars(part):
            del part.peft_config


def _forget_quantisation(model: nn.Module) -> None:
    for part in model.modules():
        for name in ("is_loaded_in_4bit", "is_quantized"):
            if vars(part).get(name):
                setattr(part, name, False)
        for name in ("hf_quantizer", "quantization_method"):
            if name in vars(part):
                delattr(part, name)
        config = getattr(part, "config", None)
        for holder in (config, getattr(config, "base_config", None)):
            if holder is not None and "quantization_config" in vars(holder):
                del holder.quantization_config


def drift(before: nn.Module, after: nn.Module, seed: int = 42) -> Drift | None:
    """Two models on the probe batch; None on the meta device."""
    return _drift(probe_logits(before, seed), probe_logits(after, seed))


def _drift(before: Tensor | None, after: Tensor | None) -> Drift | None:
    if before is None or after is None:
        return None
    before, after = before.double(), after.double()
    log_p, log_q = F.log_softmax(before, -1), F.log_softmax(after, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return Drift((after - before).abs().max().item(), before.abs().max().item(), kl.item())


def _check(drift: Drift | None, what: str, model: nn.Module, least: float) -> None:
    if drift is None:
        return
    limit = max([least, *(_TOLERANCE.get(p.dtype, 1e-4) for p in model.parameters() if p.is_floating_point())])
    if not drift.max_logit_difference <= limit * max(1.0, drift.largest_logit):
        raise ProofError(
            "settle",
            f"logits that move by {drift.max_logit_difference:.3e} when {what}",
            f"at most {limit:g} of the largest logit",
            "Keep the delta checkpoint and report this; do not export the settled model.",
        )
