"""The full checkpoint: a Hugging Face folder that holds everything.

Where the settled model is a stock class it is a stock folder. Where it is not, the folder has a model type of its own,
so that a plain loader refuses it instead of dropping the experts in silence, and brings its model code in one file that
needs torch and transformers.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sparsmith import auto, durable
from sparsmith.crafting import accounting
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.base_files import check_config, refuse_other_size
from sparsmith.crafting.base_model import auto_class, open_strictly, refuse_partial
from sparsmith.crafting.delta import role_of
from sparsmith.crafting.identity import Identity, compare, identify, our_version, plain, write_identity
from sparsmith.crafting.record import CraftRecord, attach, record_of
from sparsmith.crafting.settle import mark_settled
from sparsmith.crafting.standalone import inline
from sparsmith.errors import CheckpointError, MethodError, SparsmithError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, _STAMP = "config.json", "sparsmith"
_EDITED = "config.json or sparsmith.json was edited; restore the file, or take another checkpoint."


def prepare(model: PreTrainedModel, *, fold_scale: bool = False, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model whose weights a full checkpoint will hold: `model` itself, or a copy where something is to be changed.

    Args:
        model: settled; left untouched.
        fold_scale: multiply constant scales into the weights.
        dtype: number type of the base's weights; what the methods added keeps its own.
    """
    if not fold_scale and dtype in (None, model.dtype):
        return model
    record, settled = record_of(model), model
    model = copy.deepcopy(model)
    if fold_scale:
        configs = tuple(method.fold_scale(model, config) for method, config in record.parts)
        attach(model, replace(record, configs=configs))
    if dtype is not None:
        # modules of the method that made the class keep their masters' type; what is trained of a stock class is the base's
        home = type(model).__module__
        parts = [(method, config) for method, config in record.parts if home in method.standalone_sources()]
        kept = {name for method, config in parts for name in method.keeps_type(settled, config)}
        for name, parameter in model.named_parameters():
            if name not in kept and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def write_full(model: PreTrainedModel, folder: Path) -> Identity:
    """Write a settled model into `folder` (usually the temporary one of `durable.durable_folder`)."""
    record = record_of(model)
    strict.check_finite(str(folder), _tensors(model))
    sources = standalone_sources(model, record)
    if not sources:
        _check_stock(model)
    model.save_pretrained(folder)
    if sources:
        _add_model_code(model, folder, sources)
    return describe(model, folder)


def describe(model: PreTrainedModel, folder: Path) -> Identity:
    """Beside weights and config.json that lie in `folder`: what the model is and how it was made. Its tensors may be on the meta device."""
    record = record_of(model)
    _stamp(folder, model, record)
    rows = {
        name: strict.TensorRow(shape=shape, dtype=kind, role=role)
        for (name, (shape, kind)), role in _with_roles(model, strict.file_rows(folder))
    }
    identity = identify(model, record, "full", rows, model_config=durable.read_json(folder / CONFIG))
    write_identity(folder, identity)
    accounting.write(model, folder, {name: shape for name, (shape, _) in identity.rows().items()})
    return identity


def load_full(folder: Path, identity: Identity) -> PreTrainedModel:
    """Open a full checkpoint with our own class (or the stock one), strictly; no code of the folder runs."""
    check_identity(folder, identity)
    durable.verify_folder(folder)
    for file in sorted(folder.glob("*.json")):  # transformers passes over a broken generation_config.json in silence
        durable.read_json(file)
    configs = identity.method_configs(f"{folder}/sparsmith.json")
    model = _open(folder, identity)
    listed = identity.rows()
    state = {k: v for k, v in strict.shapes_of(_tensors(model)).items() if k in listed}
    strict.compare_tables(f"{folder}: loaded", state, {name: row for name, row in listed.items() if name in state})
    where = identity.slice_record(f"{folder}/sparsmith.json")
    base, seed = identity.base_record(), identity.seed
    attach(model, CraftRecord(configs=configs, base=base, seed=seed, slice=where, form=identity.form))
    mark_settled(model, accounting.read(folder))
    return model.eval()


def check_identity(folder: Path, identity: Identity) -> None:
    """Hold `sparsmith.json` against config.json and the headers of the weights; the hashes of the manifest come after."""
    found = durable.read_json(durable.inside(folder, CONFIG))
    check_config(str(folder / CONFIG), found)
    compare(f"{folder / CONFIG} against sparsmith.json", found, identity.model_config_json, _EDITED)
    stamp = found.get(_STAMP) if isinstance(found, dict) else None
    stamped = stamp.get("configs") if isinstance(stamp, dict) else None
    compare(f"{folder}/sparsmith.json against {CONFIG}", list(identity.configs), stamped, _EDITED, "configs")
    cut = stamp.get("slice") if isinstance(stamp, dict) else None
    compare(f"{folder}/sparsmith.json against {CONFIG}", identity.slice, cut, _EDITED, "slice")
    form = stamp.get("form") if isinstance(stamp, dict) else None
    compare(f"{folder}/sparsmith.json against {CONFIG}", identity.form, form, _EDITED, "form")
    strict.compare_folder(folder, f"{folder}/sparsmith.json", identity.rows())


def standalone_sources(model: PreTrainedModel, record: CraftRecord) -> tuple[str, ...]:
    """Modules that the folder's own code is made of, each once, lowest first; empty where the model's class is a stock
    one."""
    listed = (method.standalone_sources() for method, _ in record.parts)
    return next((sources for sources in listed if type(model).__module__ in sources), ())


def _stamp(folder: Path, model: PreTrainedModel, record: CraftRecord) -> None:
    """Repeat in config.json how the model was made, so that an edit of either file is seen, and say there what other readers look for."""
    config = durable.read_json(folder / CONFIG)
    cut: dict[str, Any] = {"slice": plain(record.slice.as_dict())} if record.slice else {}
    cut |= {"form": record.form} if record.form else {}
    for method, settings in record.parts:
        config |= plain(dict(method.files_config(model, settings)))
    config[_STAMP] = {"version": our_version(), "configs": [c.model_dump(mode="json") for c in record.configs], **cut}
    (folder / CONFIG).write_text(durable.json_text(config), encoding="utf-8")


def _check_stock(model: PreTrainedModel) -> None:
    """A folder without code must hold exactly the tensors that its class has when built from its config."""
    with torch.device("meta"):
        built = type(model)._from_config(copy.deepcopy(model.config))
    known, found = set(built.state_dict()), set(model.state_dict())
    if known != found:
        odd = sorted(known ^ found)[0]
        raise MethodError(
            f"{type(model).__name__}: {odd}",
            "a structure that the stock class does not have",
            "a stock structure after `settle`, or modules named by the method's `standalone_sources`",
            "Save the delta form instead; of exits with parts of their own, export the depths.",
        )


def _add_model_code(model: PreTrainedModel, folder: Path, sources: tuple[str, ...]) -> None:
    config_class, model_class = type(model.config).__name__, type(model).__name__
    module = f"modeling_{model.config.model_type}"
    (folder / f"{module}.py").write_text(inline(sources, our_version()), encoding="utf-8")
    config = durable.read_json(folder / CONFIG)
    opener = auto_class(record_of(model).base.task).__name__
    config["auto_map"] = {"AutoConfig": f"{module}.{config_class}", opener: f"{module}.{model_class}"}
    config["architectures"] = [model_class]
    config.get("base_config", {}).pop("_name_or_path", None)  # a path of this machine
    (folder / CONFIG).write_text(durable.json_text(config), encoding="utf-8")


def _with_roles(model: PreTrainedModel, rows: dict[str, tuple]) -> list[tuple[tuple[str, tuple], str]]:
    roles = role_of(model)
    return [((name, row), roles.get(name, "base")) for name, row in rows.items()]


def _open(folder: Path, identity: Identity) -> PreTrainedModel:
    config = cast(dict[str, Any], identity.model_config_json)
    known: type | None = auto.real_class(str(config.get("model_type")))
    opener: Any = known or auto_class(identity.base.task)
    attention = identity.base.attention
    options = {"attn_implementation": attention} if attention else {}
    try:
        _check_size(folder, config, known, identity)
        model, info = open_strictly(opener, folder, dtype="auto", use_safetensors=True, **options)
    except SparsmithError:
        raise
    except Exception as fault:  # a forged config makes transformers raise almost anything
        raise CheckpointError(
            str(folder),
            " ".join(str(fault).split())[:300],
            "a full checkpoint that this version opens",
            "Use the version that wrote it.",
        ) from fault
    refuse_partial(folder, info)
    return model


def _check_size(folder: Path, config: dict[str, Any], known: Any, identity: Identity) -> None:
    from transformers import AutoConfig

    read = known.config_class.from_dict(config) if known else AutoConfig.for_model(**config)
    refuse_other_size(str(folder / CONFIG), getattr(read, "base_config", None) or read, identity.rows())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
