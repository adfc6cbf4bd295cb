"""Published PESC checkpoints (Camelidae) become full checkpoints of ours.

Layout: a Llama checkpoint whose blocks hold `mlp.moe_adapter.router.weight` (E, d) and
`mlp.moe_adapter.experts.expert_i.adapter_down` (r, d) and `.adapter_up` (d, r). It is told by these keys and never by
`model_type`, which says "llama" and so makes plain loaders drop every expert in silence. The scale stands in the config
as `moe_scaling` and k as `topk`; where they are absent they must be given, because no tensor tells them and a wrong one
is no error but another model.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsmith import anatomy, durable
from sparsmith.crafting import full
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.apply import craft
from sparsmith.crafting.base_files import check_config
from sparsmith.crafting.base_model import load_base
from sparsmith.crafting.delta import method_state
from sparsmith.crafting.record import BaseRecord, attach_base
from sparsmith.crafting.settle import mark_settled
from sparsmith.errors import CheckpointError, CheckpointMismatch, UsageError
from sparsmith.exporting.foreign import read_weights
from sparsmith.recipe.schema import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsmith.methods.pesc.config import PescConfig

_KEY = re.compile(r"^(?:base_model\.model\.)?model\.layers\.(\d+)\.mlp\.moe_adapter\.(.+)$")
_PART = re.compile(r"^experts\.expert_(\d+)\.adapter_(down|up)\.weight$")
_ROUTER = "router.weight"
_DERIVED = "rotary_emb.inv_freq"  # old files store it; it follows from the config
_OURS = ("moe_dtype", "moe_scaling", "num_experts", "topk", "output_router_logits", "adapter_dim", "auto_map", "lora_r")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Bases whose rotary base is not 10000 although their published sparse checkpoint does not say so: (hidden, layers, kv
# heads) -> name
_OTHER_ROPE = {(7168, 60, 8): "Yi-34B (5000000)", (4096, 32, 4): "Yi-6B (5000000)"}
_ROPE = 10000.0

Blocks = dict[int, dict[str, Tensor]]
"""Block -> part (`router.weight`, `experts.expert_3.adapter_up.weight`) -> tensor."""


def import_camelidae(
    folder: str | Path,
    out: str | Path,
    *,
    adapter_scale: float | None = None,
    adapter_dim: int | None = None,
    top_k: int | None = None,
    rope_theta: float | None = None,
    base: str | Path | None = None,
) -> Path:
    """Convert a published folder.

    Args:
        folder: the published checkpoint: config.json and weights (safetensors, or pickles of tensors alone), sharded or
            not. out: the new folder, a full checkpoint. adapter_scale, top_k: s and k, where the config has no
            `moe_scaling`, `topk`. adapter_dim: r; read from the tensors, and held against this where given. rope_theta:
            base of the rotary angles, where the config has none: 10000, and required for bases known to differ. base:
            the dense base, where the folder holds the experts alone.

    Raises:
        UsageError: a figure that is needed and nowhere said, or said twice differently.
        CheckpointError, CheckpointMismatch: not this layout, damaged, or shapes that do not fit.
    """
    source = Path(folder)
    config = durable.read_json(source / "config.json")
    check_config(str(source / "config.json"), config)
    blocks, dense = _split(source)
    where = str(source / "config.json")
    scale = _agreed(where, "moe_scaling", config.get("moe_scaling"), adapter_scale, "adapter_scale")
    k = _agreed(where, "topk", config.get("topk"), top_k, "top_k")
    experts, width = _sizes(source, blocks)
    claims = (("adapter_dim", adapter_dim, width), ("adapter_dim", config.get("adapter_dim"), width))
    for name, said, real in (*claims, ("num_experts", config.get("num_experts"), experts)):
        if said is not None and said != real:
            raise CheckpointMismatch(f"{where}: {name}", str(said), f"{real}, as the tensors have it", "Correct it.")
    model = _dense_model(source, config, dense, rope_theta, base)
    settings = _pesc_config(model, sorted(blocks), experts, width, float(scale), int(k))
    crafted = craft(model, settings, inplace=True, proof=False)
    _fill(crafted, source, blocks)
    mark_settled(crafted)
    with durable.durable_folder(out) as temp:
        full.write_full(crafted, temp)
        for name in _TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(durable.inside(source, name), temp / name)
    return Path(out)


def _split(folder: Path) -> tuple[Blocks, dict[str, Tensor]]:
    """The experts by block, and the dense rest."""
    blocks: Blocks = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in read_weights(folder):
        found = _KEY.match(name)
        if found:
            blocks.setdefault(int(found[1]), {})[found[2]] = tensor
        elif not name.endswith(_DERIVED):
            dense[name] = tensor
    if not blocks:
        raise CheckpointError(
            str(folder),
            "no tensor `model.layers.N.mlp.moe_adapter...`",
            "a checkpoint in the published Camelidae layout",
            "A dense checkpoint is crafted with `sparsmith tune`; one of ours is opened with sparsmith.load.",
        )
    return blocks, dense


def _sizes(folder: Path, blocks: Blocks) -> tuple[int, int]:
    """(E, r), the same in every block; every expert there, nothing else."""
    sizes = {}
    for block, parts in blocks.items():
        where = f"{folder}: model.layers.{block}.mlp.moe_adapter"
        odd = [part for part in parts if part != _ROUTER and not _PART.match(part)]
        count = len({found[1] for part in parts if (found := _PART.match(part))})
        wanted = [_ROUTER] + [f"experts.expert_{i}.adapter_{p}.weight" for i in range(count) for p in ("down", "up")]
        missing = [part for part in wanted if part not in parts]
        if odd or missing or not count:
            found_text = f"`{odd[0]}`" if odd else "no experts" if not count else f"no `{missing[0]}`"
            raise CheckpointMismatch(
                where, found_text, "a router and experts 0..E-1, each with down and up", "Fetch it again."
            )
        sizes[block] = (count, parts["experts.expert_0.adapter_down.weight"].shape[0])
    if len(set(sizes.values())) > 1:
        raise CheckpointMismatch(
            str(folder), f"(E, r) that differ: {sorted(set(sizes.values()))}", "one (E, r)", "Fetch it again."
        )
    return next(iter(sizes.values()))


def _agreed(where: str, key: str, said: Any, given: Any, argument: str) -> Any:
    """The figure of the config or of the argument; neither, or two different ones, is an error."""
    if said is None and given is None:
        raise UsageError(
            f"{where}: {key}",
            "nothing",
            "the figure that the model was trained with",
            f"Give `{argument}`; no tensor tells it.",
        )
    if said is not None and given is not None and said != given:
        raise UsageError(f"{where}: {key}", repr(said), f"{given!r}, as `{argument}` says", f"Drop `{argument}`.")
    value = said if given is None else given
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UsageError(f"{where}: {key}", repr(value), "a positive number", f"Correct it, or give `{argument}`.")
    return value


def _dense_model(
    folder: Path, config: dict[str, Any], dense: dict[str, Tensor], rope_theta: float | None, base: str | Path | None
) -> PreTrainedModel:
    if not dense:
        if base is None:
            raise UsageError(
                str(folder), "experts alone", "the dense weights too", "Give `base`, the folder of the base."
            )
        return load_base(ModelSettings(path=str(base), dtype="auto"))
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    family = config.get("model_type")
    family = family if family in anatomy.families() else "llama"
    kept = {key: value for key, value in config.items() if key not in (*_OURS, "model_type", "architectures")}
    kept["rope_theta"] = _rope(folder, config, rope_theta)
    dtype = next(iter(dense.values())).dtype
    hf_config = AutoConfig.for_model(family, **kept)
    opener: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    try:
        model, info = opener.from_pretrained(
            None, config=hf_config, state_dict=dense, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError, KeyError) as fault:
        raise CheckpointMismatch(
            str(folder), " ".join(str(fault).split())[:300], f"{family} weights", "Fetch it again."
        ) from fault
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise CheckpointMismatch(
                f"{folder}: {first}", kind.replace("_", " "), f"the tensors of {family}", "Fetch it again."
            )
    attach_base(model, BaseRecord(id="", dtype=strict.dtype_name(dtype)))
    return model.eval()


def _rope(folder: Path, config: dict[str, Any], given: float | None) -> float:
    nested = config.get("rope_parameters") or {}
    said = config.get("rope_theta", nested.get("rope_theta") if isinstance(nested, dict) else None)
    where = str(folder / "config.json")
    if said is not None or given is not None:
        return float(_agreed(where, "rope_theta", said, given, "rope_theta"))
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    known = _OTHER_ROPE.get((config.get("hidden_size"), config.get("num_hidden_layers"), heads))  # type: ignore[arg-type]
    if known:
        raise UsageError(
            f"{where}: rope_theta", "nothing", f"a rotary base; this is the shape of {known}", "Give `rope_theta`."
        )
    return _ROPE


def _pesc_config(model: Any, layers: list[int], experts: int, width: int, scale: float, k: int) -> PescConfig:
    from sparsmith.methods.base import LoraSettings
    from sparsmith.methods.pesc.config import PescConfig

    every = layers == list(range(model.config.num_hidden_layers))
    return PescConfig(
        num_experts=experts,
        top_k=k,
        adapter_dim=width,
        adapter_scale=scale,
        layers="all" if every else tuple(layers),
        lora=LoraSettings(enabled=False),
    )


def _fill(model: PreTrainedModel, folder: Path, blocks: Blocks) -> None:
    """Stack each block's experts into `down` (E, r, d) and `up` (E, d, r), float32."""
    state = method_state(model)
    row = anatomy.of(model.config)
    loaded = {}
    for block, parts in blocks.items():
        home = f"base.{row.blocks}.{block}.{row.ffn}.pesc"
        count = sum(1 for part in parts if part.endswith("adapter_up.weight"))
        loaded[f"{home}.router.weight"] = parts[_ROUTER].float()
        for part in ("down", "up"):
            stack = [parts[f"experts.expert_{i}.adapter_{part}.weight"].float() for i in range(count)]
            if len({tensor.shape for tensor in stack}) > 1:
                raise CheckpointMismatch(
                    f"{folder}: block {block} {part}", "experts of different shapes", "one shape", "Fetch it again."
                )
            loaded[f"{home}.{part}"] = torch.stack(stack)
    strict.check_finite(str(folder), loaded)
    strict.fill(str(folder), state, loaded)
