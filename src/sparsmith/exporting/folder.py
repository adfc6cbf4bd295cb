"""Export: one folder with the settled model, its tokenizer, its model code, a card, and the proof that strangers open
it.

All or nothing: the folder is written beside its place, proven there, and renamed. A proof that fails leaves no folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sparsmith import durable
from sparsmith.crafting import full
from sparsmith.crafting.base_model import open_tokenizer
from sparsmith.crafting.checkpoint import estimate_bytes, find_checkpoint, load
from sparsmith.crafting.identity import FILE
from sparsmith.crafting.record import record_of
from sparsmith.crafting.settle import Drift, drift, is_settled, settle_report, settled_copy
from sparsmith.exporting.model_card import count_parameters, model_card
from sparsmith.exporting.prove import prove
from sparsmith.exporting.report import ExportReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROOF, CARD = "proof.json", "README.md"


def export(
    model: PreTrainedModel | str | Path,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    proof: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    fold_scale: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a model that others open.

    Args:
        model: a crafted model (left untouched; one that is not settled is settled in a copy), or the folder of a
            checkpoint or run. out: the folder to make. tokenizer: written beside the weights, its chat template with
            it; a checkpoint folder's own where there is one. proof: open the folder in a clean process and compare
            logits; the figures go into the card and `proof.json`. dtype: number type of the base's weights in the files
            (default: as they are). What the methods added keeps float32. fold_scale: multiply constant scales into the
            weights. facts: of the run, for the card: `recipe` (text), `run`, `plan`, `proof` (plain data).

    Raises:
        ProofError: the folder does not open elsewhere or computes something else; it is not kept.
    """
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or _tokenizer_beside(find_checkpoint(Path(model)))
        model = load(model)
    settled = model if is_settled(model) else settled_copy(model)
    exported = full.prepare(settled, fold_scale=fold_scale, dtype=getattr(torch, dtype) if dtype else None)
    report = settle_report(settled)
    changed = drift(settled, exported) if exported is not settled else None
    out = Path(out)
    with durable.durable_folder(out, needed=estimate_bytes(exported, True)) as folder:
        needs_code = bool(full.standalone_sources(exported, record_of(exported)))
        full.write_full(exported, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _refuse_traps(folder)
        proven = prove(exported, folder, needs_code=needs_code, tokenizer=tokenizer) if proof else None
        result = ExportReport(
            path=out,
            model_type=exported.config.model_type,
            needs_code=needs_code,
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            parameters=count_parameters(exported),
            proof=proven,
            settle=report.as_dict() if report and report.merged else None,
            conversion=asdict(changed) if isinstance(changed, Drift) else None,
        )
        if proven is not None:
            (folder / PROOF).write_text(durable.json_text(proven), encoding="utf-8")
        (folder / CARD).write_text(model_card(exported, result, dict(facts or {})), encoding="utf-8")
    return result


def _refuse_traps(folder: Path) -> None:
    """Files that a plain loader would act on and that an export of ours never has."""
    for name in ("adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        assert not (folder / name).exists(), name


def _tokenizer_beside(folder: Path) -> PreTrainedTokenizerBase | None:
    if not (folder / FILE).is_file() or not (folder / "tokenizer_config.json").is_file():
        return None
    return open_tokenizer(folder)
