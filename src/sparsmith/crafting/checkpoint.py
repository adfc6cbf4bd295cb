"""Save and load, strictly: a checkpoint comes back as the model that was saved, or not at all.

Two forms. *Delta* (the default) holds what was trained and names its base; *full* holds everything and needs no base.
`load` opens both.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from sparsmith import durable
from sparsmith.crafting import delta
from sparsmith.crafting import full as full_form
from sparsmith.crafting.apply import craft
from sparsmith.crafting.base_model import load_base
from sparsmith.crafting.gathered import gathered
from sparsmith.crafting.identity import FILE, Identity, base_hash, compare, dense_config, read_identity, weights_folder
from sparsmith.crafting.plan import plan
from sparsmith.crafting.record import base_of, record_of
from sparsmith.crafting.settle import is_settled, settled_copy
from sparsmith.errors import CheckpointError, CheckpointMismatch, MethodError
from sparsmith.ops.shards import is_sharded
from sparsmith.recipe.schema import ModelSettings
from sparsmith.runs import last_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsmith.methods.base import MethodConfig

# up to this size the base is hashed in full at every load (about 2 s); above it `check="full"` asks for it
_FULL_CHECK_BYTES = 4 << 30
_SMALL = 10_000_000  # parameters that any machine can hold


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    full: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fold_scale: bool = False,
    replace: bool = False,
) -> Path:
    """Write a checkpoint; the folder is whole or not there. Of several processes all must call, and the first writes.

    Args:
        model: a crafted model.
        out: the folder to make.
        full: everything, settled (LoRA merged), self-contained; a model that is not settled yet is settled in a copy.
        tokenizer: written beside the weights.
        fold_scale: full only: multiply constant scales into the weights, for runtimes that know none.
        replace: put it in the place of an older folder.
    """
    out = Path(out)
    if full and any(is_sharded(parameter) for parameter in model.parameters()):
        raise MethodError("save", "a sharded model", "one in one piece", "Save its delta, and load that to export it.")
    with gathered(model):
        if is_writer():
            _write(model, out, full, tokenizer, fold_scale, replace)
    return out


def _write(model: PreTrainedModel, out: Path, full: bool, tokenizer: Any, fold_scale: bool, replace: bool) -> None:
    with durable.durable_folder(out, replace=replace, needed=estimate_bytes(model, full)) as folder:
        if full:
            write_full(model, folder, fold_scale=fold_scale)
        else:
            if is_settled(model):
                raise MethodError(
                    "save",
                    "a settled model",
                    "a model that still has its trained parts apart",
                    "Save it with full=True.",
                )
            if fold_scale:
                raise MethodError("fold_scale", "a delta", "a full checkpoint", "Save with full=True.")
            delta.write_delta(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def write_full(model: PreTrainedModel, folder: Path, *, fold_scale: bool = False) -> None:
    """The files of a full checkpoint, of a settled copy where the model is not settled."""
    settled = model if is_settled(model) else settled_copy(model)
    full_form.write_full(full_form.prepare(settled, fold_scale=fold_scale), folder)


def load(
    path: str | Path,
    *,
    base: str | Path | PreTrainedModel | None = None,
    check: Literal["auto", "fast", "full"] = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Open a checkpoint of either form (or a run folder, whose `model/` is meant), in evaluation mode.

    Args:
        path: the folder.
        base: a delta's base where it no longer lies at the recorded path: a folder, a hub id or a loaded model (left
        untouched). check: how the base is held against the recorded hashes: `fast` reads headers and first MiB of the
        shards, `full` every byte,
            `auto` is `full` up to 4 GiB.
        trust_remote_code: let a base bring its own code; a full checkpoint of ours never needs it.

    Raises:
        CheckpointError: damaged or not ours.
        CheckpointMismatch: whole, but of another base, config or build; tells both values.
    """
    folder = find_checkpoint(Path(path))
    identity = read_identity(folder)
    if identity.kind == "full":
        if base is not None:
            raise CheckpointMismatch(str(folder), "a full checkpoint", "a delta, when `base` is given", "Drop `base`.")
        return full_form.load_full(folder, identity)
    identity = delta.read_delta_identity(folder)
    durable.verify_folder(folder)
    dense = _open_base(folder, identity, base, trust_remote_code)
    _check_base(folder, identity, dense, check)
    configs = identity.method_configs(str(folder / FILE))
    _check_size(folder, identity, dense, configs)
    model = craft(dense, configs, inplace=dense is not base, seed=identity.seed, proof=False)
    _check_frozen(folder, identity, model)
    delta.fill_delta(model, folder, identity)
    return cast("PreTrainedModel", model.eval())


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or the `model/` of a run folder; of a run of several stages, of its last."""
    path = last_stage(path)
    if not (path / FILE).is_file() and (path / "model" / FILE).is_file():
        return path / "model"
    return path


def is_writer() -> bool:
    """True on the one process of a distributed run that writes."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def estimate_bytes(model: PreTrainedModel, full: bool) -> int:
    """Bytes that a save will write, tensors alone."""
    if full:
        return sum(t.numel() * t.element_size() for t in model.state_dict().values() if hasattr(t, "numel"))
    parts = (delta.method_state(model), delta.lora_state(model))
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())


def _open_base(folder: Path, identity: Identity, base: Any, trust_remote_code: bool) -> PreTrainedModel:
    if base is not None and not isinstance(base, (str, Path)):
        return base
    row = identity.base
    # the folder of an earlier stage is written relative to the checkpoint; an absolute one stays as it is
    recorded = str(folder.absolute() / row.folder) if row.folder else None
    place = str(base) if base is not None else recorded or row.id
    if not place or (base is None and recorded and not Path(recorded).is_dir()):
        raise CheckpointError(
            f"{folder}: base",
            f"no folder {place}" if place else "a base that lay in no folder",
            "the base that the delta was trained on",
            "Tell where it is: sparsmith.load(path, base=FOLDER), or base=MODEL.",
        )
    settings: dict[str, Any] = {"path": place, "quant": row.quant, "revision": row.revision if base is None else None}
    if row.task != "causal_lm":
        settings |= {"task": row.task, "num_labels": len(row.labels) or None}
    return load_base(
        ModelSettings(
            **settings,
            dtype=cast(Any, row.dtype),
            attention=cast(Any, _attention(row)),
            trust_remote_code=trust_remote_code,
        ),
        labels=row.labels,
        seed=identity.seed,
    )


def _attention(row: Any) -> str:
    return row.attention if row.attention in ("eager", "sdpa", "flash_attention_2") else "auto"


def _check_base(folder: Path, identity: Identity, dense: PreTrainedModel, check: str) -> None:
    """Hold quantisation, number type and file hashes of the base against the record."""
    row, found = identity.base, base_of(dense)
    where = f"{folder}: base"
    if row.quant != found.quant:
        raise CheckpointMismatch(
            f"{where}.quant",
            found.quant,
            row.quant,
            "The LoRA was trained around the rounding errors of the quantised base: elsewhere it is another function.",
        )
    if row.task != found.task:
        raise CheckpointMismatch(f"{where}.task", found.task, row.task, "Load the base for the task of the delta.")
    if row.dtype != found.dtype:
        raise CheckpointMismatch(f"{where}.dtype", found.dtype, row.dtype, "Load the base in the recorded number type.")
    place = weights_folder(found)
    if place is None or row.fast_hash is None:
        return  # a base in memory: its tensors are held against `frozen_hash`
    mend = "Give the base that the delta was trained on: sparsmith.load(path, base=FOLDER)."
    if (fast := base_hash(place, "fast")) != row.fast_hash:
        raise CheckpointMismatch(f"{where}.fast_hash of {place}", str(fast), row.fast_hash, mend)
    size = sum(file.stat().st_size for file in durable.weight_files(place))
    wants_full = check == "full" or (check == "auto" and size <= _FULL_CHECK_BYTES)
    if wants_full and (whole := base_hash(place, "full")) != row.full_hash:
        raise CheckpointMismatch(f"{where}.full_hash of {place}", str(whole), str(row.full_hash), mend)


def _check_size(folder: Path, identity: Identity, dense: PreTrainedModel, configs: tuple[MethodConfig, ...]) -> None:
    """Forged settings that ask for far more tensors than the files hold are refused before anything is allocated."""
    planned = plan(dense.config, configs).trained_params
    held = sum(math.prod(row.shape) for row in identity.tensors.values())
    if planned > 4 * held + _SMALL:  # smaller differences are told by the tensor's name, below
        raise CheckpointMismatch(
            f"{folder / FILE}: configs",
            f"settings with {planned:,} trained parameters",
            f"{held:,}, as the files hold",
            "The settings were edited; restore the file, or take another checkpoint.",
        )


def _check_frozen(folder: Path, identity: Identity, model: PreTrainedModel) -> None:
    mend = "Give the base that the delta was trained on: sparsmith.load(path, base=FOLDER)."
    compare(f"{folder}: base.config", dense_config(model), identity.base.config, mend)
    found = delta.frozen_hash(model, delta.method_state(model))
    if found != identity.frozen_hash:
        raise CheckpointMismatch(f"{folder}: frozen_hash", found, str(identity.frozen_hash), mend)


def crafted_configs(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The configs of a crafted model as plain data, for cards and reports."""
    return [config.model_dump(mode="json") for config in record_of(model).configs]
