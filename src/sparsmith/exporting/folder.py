"""Export: one folder with the settled model, its tokenizer, its model code, a card, and the proof that strangers open
it.

All or nothing: the folder is written beside its place, proven there, and renamed. A proof that fails leaves no folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sparsmith import anatomy, durable
from sparsmith.crafting import accounting, full
from sparsmith.crafting.base_model import open_tokenizer
from sparsmith.crafting.checkpoint import estimate_bytes, find_checkpoint, load
from sparsmith.crafting.identity import FILE, Identity
from sparsmith.crafting.plan import plan
from sparsmith.crafting.record import SliceRecord, record_of
from sparsmith.crafting.settle import Drift, drift, is_settled, refuse_other_form, settle_report, settled_copy
from sparsmith.crafting.slices import at_depth, depths_of, slice_of
from sparsmith.crafting.tensors import content_hash
from sparsmith.errors import LayoutMismatch, MethodError, ProofError, UsageError
from sparsmith.exporting import timing
from sparsmith.exporting.model_card import count_parameters, model_card
from sparsmith.exporting.prove import prove
from sparsmith.exporting.report import ExportReport, SliceReports

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROOF, CARD = "proof.json", "README.md"


def export(
    model: PreTrainedModel | str | Path,
    out: str | Path,
    *,
    depth: int | None = None,
    depths: Literal["all"] | Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    proof: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    fold_scale: bool = False,
    form: str = "auto",
    deci: bool = False,
    measure: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Any:
    """Write a model that others open.

    Args:
        model: a crafted model (left untouched; one that is not settled is settled in a copy), or the folder of a
            checkpoint or run. out: the folder to make. depth: of a depth-elastic model, the exit that is cut out; absent
            = the full depth. depths: several, or `all`, each in a folder `depth-N` of `out`. tokenizer: written beside
            the weights, its chat template with it; a checkpoint folder's own where there is one. proof: open the folder
            in a clean process and compare logits; the figures go into the card and `proof.json`. dtype: number type of
            the base's weights in the files (default: as they are). What the methods added keeps float32. fold_scale:
            multiply constant scales into the weights. form: of a method that deletes parts, what is left
            (`methods.base.FORMS`). deci: write `deci_config.json` too, the sizes in the words of DeciLM. measure: time
            a pruned model beside the dense one, for the accounting. facts: of the run, for the card: `recipe` (text),
            `run`, `plan`, `proof` (plain data).

    Returns:
        An `ExportReport`; with `depths` a `SliceReports` of one for each.

    Raises:
        MethodError: a depth that was not tuned as an exit.
        LayoutMismatch: a form that the model cannot take; `deci` for one that DeciLM cannot describe.
        ExportMismatch: the files do not hold what the accounting says.
        ProofError: the folder does not open elsewhere or computes something else; it is not kept.
    """
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or _tokenizer_beside(find_checkpoint(Path(model)))
        model = load(model)
    chosen = _chosen(model, depth, depths)
    if is_settled(model):
        refuse_other_form(model, form)
    settled = model if is_settled(model) else settled_copy(model, form)
    beside = _foreign(settled, "deci") if deci else {}
    if measure and (record_of(settled).form is None or chosen):
        found = "depths" if chosen else "a model from which nothing was deleted"
        raise MethodError("measure", found, "a whole model that was pruned", "Use `sparsmith bench`.")
    prepared = full.prepare(settled, fold_scale=fold_scale, dtype=getattr(torch, dtype) if dtype else None)
    changed = drift(settled, prepared) if prepared is not settled else None
    parent = content_hash(prepared.state_dict().items()) if chosen else ""
    merged = settle_report(settled)
    figures = {
        "settle": merged.as_dict() if merged and (merged.merged or merged.dequantise) else None,
        "conversion": asdict(changed) if isinstance(changed, Drift) else None,
    }
    reports = [
        _write(
            slice_of(prepared, one, parent=parent),
            Path(out) / f"depth-{one}" if depths is not None else Path(out),
            tokenizer,
            proof,
            figures,
            dict(facts or {}),
            beside,
            measure,
        )
        for one in chosen or (None,)
    ]
    return reports[0] if depths is None else SliceReports(tuple(reports))


def _chosen(model: Any, depth: int | None, depths: str | Sequence[int] | None) -> tuple[int, ...]:
    """The depths to cut out, all of them checked before the first is written; () = the model as it is."""
    if depth is not None and depths is not None:
        raise UsageError("depth", f"{depth} beside `depths`", "one of the two", "Drop one.")
    if depth is None and depths is None:
        return ()
    known = depths_of(model)
    if depths == "all":
        if len(known) == 1:
            mend = "Tune the model with `method: soft`, or export without depths."
            raise MethodError("depths", f"a model of the one depth {known[0]}", "a depth-elastic model", mend)
        return known
    wanted = (depth,) if depth is not None else tuple(int(one) for one in depths or ())
    if not wanted:
        raise UsageError("depths", "an empty list", "at least one depth", "Name one of " + ", ".join(map(str, known)))
    for one in wanted:
        at_depth(model, one)
    return wanted


def _write(
    exported: PreTrainedModel,
    out: Path,
    tokenizer: Any,
    proof: bool,
    figures: dict[str, Any],
    facts: dict[str, Any],
    beside: Mapping[str, Any],
    measure: bool,
) -> ExportReport:
    """One folder, whole and proven or not there."""
    record = record_of(exported)
    with durable.durable_folder(out, needed=estimate_bytes(exported, True)) as folder:
        needs_code = bool(full.standalone_sources(exported, record))
        identity = full.write_full(exported, folder)
        if record.slice is not None:
            _check_count(exported, identity)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, data in beside.items():
            (folder / name).write_text(durable.json_text(data), encoding="utf-8")
        _measure(exported, folder, measure)
        _refuse_traps(folder)
        proven = prove(exported, folder, needs_code=needs_code, tokenizer=tokenizer) if proof else None
        result = ExportReport(
            path=out,
            model_type=exported.config.model_type,
            needs_code=needs_code,
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            parameters=count_parameters(exported),
            proof=proven,
            **figures,
            slice=slice_facts(exported, record.slice) if record.slice else None,
            form=record.form,
            accounting=accounting.columns(folder),
            cautions=tuple(one for method, config in record.parts for one in method.cautions(exported, config)),
        )
        if proven is not None:
            (folder / PROOF).write_text(durable.json_text(proven), encoding="utf-8")
        (folder / CARD).write_text(model_card(exported, result, facts), encoding="utf-8")
    return result


def _foreign(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """Configs for another runtime, of the first method that knows any."""
    parts = record_of(model).parts
    found = next(filter(None, (method.foreign(model, config, kind) for method, config in parts)), None)
    if not found:
        names = ", ".join(method.name for method, _ in parts)
        raise LayoutMismatch(f"export: {kind}", names, "a method that prunes blocks", f"Leave `{kind}` out.")
    return dict(found)


def _measure(model: PreTrainedModel, folder: Path, timed: bool) -> None:
    """FLOPs of a pruned model, and its times where asked for, into its accounting."""
    known = accounting.columns(folder)
    if known is None:
        return
    figures = timing.flops_per_token(model, known["dense_config"])
    if timed:
        figures["latency"] = timing.latency(model, known["dense_config"])
    accounting.add_measured(folder, figures)


def slice_facts(model: PreTrainedModel, cut: SliceRecord) -> dict[str, Any]:
    """Of the report and the card: the exit, how many blocks it has, and what it was cut from."""
    return {
        "depth": cut.depth,
        "of": cut.of,
        "blocks": len(anatomy.blocks(model)),
        "exits": list(cut.exits),
        "parent": cut.parent,
        "still_elastic": list(depths_of(model)),
    }


def _check_count(model: PreTrainedModel, identity: Identity) -> None:
    """The files hold as many numbers as the config of the slice says, tied weights once."""
    config = getattr(model.config, "base_config", None) or model.config
    configs = record_of(model).configs
    wanted = plan(config, configs).total_params if configs else anatomy.shape_of(config).total_params
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = sum(tensor.numel() for name, tensor in model.state_dict().items() if name not in parameters)
    found = sum(math.prod(row.shape) for row in identity.tensors.values()) - buffers
    if found != wanted:
        raise ProofError(
            "export",
            f"{found:,} numbers in the files",
            f"{wanted:,}, as the config of the slice says",
            "This is a fault of the cut; please report it.",
        )


def _refuse_traps(folder: Path) -> None:
    """Files that a plain loader would act on and that an export of ours never has."""
    for name in ("adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        assert not (folder / name).exists(), name


def _tokenizer_beside(folder: Path) -> PreTrainedTokenizerBase | None:
    if not (folder / FILE).is_file() or not (folder / "tokenizer_config.json").is_file():
        return None
    return open_tokenizer(folder)
