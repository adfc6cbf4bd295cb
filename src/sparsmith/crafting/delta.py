"""The delta checkpoint: only what training changed, and the identity of the base that it belongs to.

Three files: `sparsmith_delta.safetensors` (every method's `state`), PEFT's `adapter_model.safetensors` with
`adapter_config.json` where there is a LoRA (under names of our own where PEFT would open it and drop the rest), and
`sparsmith.json`. The header of the first repeats the settings of the last: some settings (scale, top-k, activation) change
the function but no shape, and an edit of them must not pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsmith import anatomy, durable
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.identity import Identity, compare, identify, plain, read_identity, write_identity
from sparsmith.crafting.lora import ADAPTER, lora_parameters
from sparsmith.crafting.record import record_of
from sparsmith.errors import CheckpointError, CheckpointMismatch, MethodError
from sparsmith.ops.shards import is_sharded, part, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "sparsmith_delta.safetensors"
LORA_WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's names, by which PEFT and transformers open the LoRA alone."""
_OWN_LORA = ("sparsmith_lora.safetensors", "sparsmith_lora.json")
_HEADER = "sparsmith"
_FROZEN = "sparsmith_frozen_hash"
_PEFT_PREFIX = "base_model.model."
# of adapter_config.json: what differs between library versions or machines without changing the function
_VOLATILE_LORA = frozenset(("peft_version", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping"))
_EDITED = "One of the two was edited; restore the file, or take another checkpoint."


def write_delta(model: PreTrainedModel, folder: Path) -> Identity:
    """Write the files of a delta into `folder`, which is usually the temporary one of `durable.durable_folder`.

    Raises:
        CheckpointError: a tensor holds NaN or infinity; nothing of that file is written then.
    """
    record = record_of(model)
    state, lora = method_state(model), lora_state(model)
    roles = role_of(model)
    table = strict.table_of(state, roles) | strict.table_of(lora, {}, "lora")
    identity = identify(model, record, "delta", table, frozen_hash=frozen_hash(model, state), place=folder)
    strict.write_tensors(folder / WEIGHTS, state, {_HEADER: json.dumps(identity.core(), sort_keys=True)})
    if lora:
        weights, settings = lora_files(model, state)
        strict.write_tensors(folder / weights, lora, {})
        (folder / settings).write_text(durable.json_text(lora_settings(model)), encoding="utf-8")
    write_identity(folder, identity)
    return identity


def read_delta_identity(folder: Path) -> Identity:
    """`sparsmith.json`, held against the headers of the weights: settings, and name, shape and type of every tensor.

    The hashes of the manifest come after this, so that an edit is told with both values and not as a mere difference.
    """
    identity = read_identity(folder)
    if identity.kind != "delta":
        raise CheckpointMismatch(f"{folder}: kind", identity.kind, "delta", "Open it with sparsmith.load.")
    file = durable.inside(folder, WEIGHTS)
    if not file.is_file():
        raise CheckpointError(str(file), "no such file", "the trained tensors", "Take another checkpoint.")
    header = strict.read_metadata(file).get(_HEADER, "")
    written = durable.parse_json(header.encode(), f"{file}: header")
    compare(f"{folder}/sparsmith.json against {WEIGHTS}", identity.core(), written, _EDITED)
    strict.compare_folder(folder, f"{folder}/sparsmith.json", identity.rows())
    return identity


def fill_delta(model: PreTrainedModel, folder: Path, identity: Identity | None = None) -> None:
    """Load the tensors of a delta into a model that was crafted in the same way, strictly.

    Raises:
        CheckpointMismatch: any difference in settings, base, names, shapes or number types.
    """
    if identity is None:
        identity = read_delta_identity(folder)
        durable.verify_folder(folder)
    record = record_of(model)
    ours = [plain(config.model_dump(mode="json")) for config in record.configs]
    # read as settings first: a key that is younger than the file has its default
    theirs = [plain(config.model_dump(mode="json")) for config in identity.method_configs(str(folder))]
    compare(f"{folder}: configs", theirs, ours, "Craft the model with the checkpoint's configs.")
    state, lora = method_state(model), lora_state(model)
    weights, settings = lora_files(model, state)
    _check_lora_settings(model, durable.inside(folder, settings), bool(lora))
    found = strict.read_tensors(folder / WEIGHTS)
    found_lora = strict.read_tensors(folder / weights) if lora else {}
    strict.fill(f"{folder / WEIGHTS}", state, found)
    strict.fill(f"{folder / weights}", lora, found_lora)
    _check_landed(model, found)


def method_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that every method wants kept. Two methods that name the same tensor are a fault of theirs."""
    result: dict[str, Tensor] = {}
    for method, config in record_of(model).parts:
        for name, tensor in method.state(model, config).items():
            if name in result:
                raise MethodError(f"{method.name}.state", f"`{name}` twice", "each tensor once", "Change `state`.")
            result[name] = tensor
    return result


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """LoRA tensors under the names that PEFT writes, so that PEFT alone can read the file where the class is a stock
    one."""
    return {
        _PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".", 1): parameter.detach()
        for name, parameter in lora_parameters(model)
    }


def lora_files(model: nn.Module, state: dict[str, Tensor]) -> tuple[str, str]:
    """Names of the LoRA's weights and settings.

    A model of a stock class whose norm or head trained too would open in PEFT without them, as another function and in silence: there
    the names are ours; so they are for a mixture, which crafting may have made of a dense base, and whose targets PEFT rewrites. A model
    of a class of ours does not open in PEFT at all.
    """
    stock, mixture = anatomy.base_of(model) is model, bool(anatomy.anatomy_of(model).experts)
    return _OWN_LORA if stock and (state or mixture) else (LORA_WEIGHTS, LORA_CONFIG)


def lora_settings(model: nn.Module) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    data = model.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr, index]
    data = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in data.items()}
    return plain({**data, "base_model_name_or_path": record_of(model).base.id})


def frozen_hash(model: nn.Module, state: dict[str, Tensor]) -> str:
    """sha256 over what the delta leaves out: the base as it lies in the crafted model, quantised where it is.

    Of a sharded model it is the hash that `remember_frozen` took before.
    """
    known = getattr(model, _FROZEN, None)
    if known is not None and any(is_sharded(parameter) for parameter in model.parameters()):
        return known
    held = {name for name, _ in lora_parameters(model)} | state.keys()
    places = {
        tensor.data_ptr() for tensor in state.values() if tensor.numel()
    }  # a tied tensor is held under its other name
    rest = ((name, t) for name, t in model.state_dict().items() if name not in held and isinstance(t, Tensor))
    return strict.content_hash((name, t) for name, t in rest if not t.numel() or t.data_ptr() not in places)


def remember_frozen(model: nn.Module) -> None:
    """Keep the hash of what stays frozen, before sharding: later no rank holds those tensors whole."""
    object.__setattr__(model, _FROZEN, frozen_hash(model, method_state(model)))


def role_of(model: nn.Module) -> dict[str, str]:
    """Name of a trained tensor -> its role."""
    record = record_of(model)
    tables = [method.roles(model, config) for method, config in record.parts]
    return {name: role for table in tables for role, rows in table.items() for name, _ in rows}


def _check_lora_settings(model: nn.Module, file: Path, wanted: bool) -> None:
    if file.is_file() != wanted:
        shown = ("no LoRA", "a LoRA")
        raise CheckpointMismatch(str(file), shown[file.is_file()], shown[wanted], _EDITED)
    if wanted:
        found, ours = durable.read_json(file), lora_settings(model)
        if not isinstance(found, dict):
            raise CheckpointMismatch(str(file), type(found).__name__, "an object", _EDITED)
        kept = [{k: v for k, v in side.items() if k not in _VOLATILE_LORA} for side in (found, ours)]
        compare(str(file), kept[0], kept[1], "The LoRA of the file is not the one that its config asks for.")


def _check_landed(model: nn.Module, found: dict[str, Tensor]) -> None:
    """A method whose `state` hands out copies would load into nowhere: seen here."""
    for name, tensor in method_state(model).items():
        start, stop = rows_of(tensor)
        wanted = found[name][start:stop] if is_sharded(tensor) else found[name]
        if not part(tensor.detach()).to("cpu").equal(wanted):
            raise MethodError(
                name,
                "a tensor that did not take the loaded values",
                "`state` to hand out the model's own tensors",
                "Do not copy in `state`.",
            )
