"""Reading the dense base, strictly: a weight that the file does not hold is an error, never a random tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.crafting.base_files import check_base_folder, check_config, refuse_other_size, refuse_recast
from sparsmith.crafting.record import BaseRecord, attach_base
from sparsmith.errors import (
    CheckpointError,
    CheckpointMismatch,
    EnvironmentFault,
    MethodError,
    SparsmithError,
    nearest,
)
from sparsmith.recipe import is_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsmith.recipe.schema import ModelSettings

EMBEDDED = "embedded"


def resolve_base(path: str, base_dir: Path | None = None) -> str:
    """A folder's absolute path where `path` is one (relative to `base_dir`), the shipped base for `embedded`, else a hub id."""
    if path == EMBEDDED:
        from sparsmith.embedded import base_path

        return str(base_path())
    folder = Path(path).expanduser()
    if not folder.is_absolute() and base_dir is not None:
        folder = base_dir / folder
    return str(folder.resolve()) if folder.is_dir() else path


def refuse_absent(path: str) -> None:
    """A path that is neither a folder nor a hub id is told at once, before a library goes to look for it.

    Raises:
        CheckpointError: names the path.
    """
    if Path(path).is_dir() or is_hub_id(path, Path.cwd()):
        return
    raise CheckpointError(
        f"model.path {path}",
        "a file" if Path(path).exists() else "nothing there",
        "the folder of a checkpoint, a hub id `owner/name`, or `embedded`",
        "Check the path; in a recipe it is relative to the recipe's folder.",
    )


def load_base(settings: ModelSettings, base_dir: Path | None = None) -> PreTrainedModel:
    """The dense model that a recipe names, in evaluation mode.

    Raises:
        CheckpointError: the folder cannot be read, or is not safe to open.
        CheckpointMismatch: it misses tensors of the architecture, or holds foreign, reshaped or recast ones.
        EnvironmentFault: `quant: nf4` without bitsandbytes.
    """
    import torch

    if settings.task != "causal_lm":
        raise MethodError(
            "model.task", settings.task, "causal_lm", "No installed method tunes a classifier; use task causal_lm."
        )
    path = resolve_base(settings.path, base_dir)
    refuse_absent(path)
    options: dict[str, Any] = {"dtype": "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)}
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    if settings.quant == "nf4":
        options["quantization_config"] = _nf4()
    model = open_base(
        path, revision=settings.revision, trust_remote_code=settings.trust_remote_code, shown=settings.path, **options
    )
    attach_base(
        model,
        BaseRecord(
            id=settings.path,
            folder=Path(path) if Path(path).is_dir() else None,
            revision=settings.revision,
            quant=settings.quant,
            dtype=str(model.dtype).removeprefix("torch."),
        ),
    )
    return model.eval()


def open_base(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, shown: str = "", **options: Any
) -> PreTrainedModel:
    """A causal language model whose files hold exactly what its architecture asks for.

    Args:
        path: a folder or hub id. shown: how the user wrote it. options: for transformers' `from_pretrained`.

    Raises:
        CheckpointError, CheckpointMismatch: as `load_base`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shown, folder = f"model.path {shown or path}", Path(path)
    rows = check_base_folder(folder) if folder.is_dir() else {}
    remote: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **remote)
        check_config(shown, {**config.to_dict(), "attn_implementation": config._attn_implementation})
        quantised = getattr(config, "quantization_config", None)
        if rows and quantised is None:  # quantised tensors are packed
            refuse_other_size(f"{path}/config.json", config, rows)
        model, info = open_strictly(
            AutoModelForCausalLM, path, config=config, use_safetensors=True, **remote, **options
        )
    except SparsmithError:
        raise
    except Exception as fault:  # a broken folder makes transformers raise almost anything
        raise CheckpointError(
            shown,
            " ".join(str(fault).split())[:300],
            "a folder or hub id of a Hugging Face causal language model",
            "Check the path; a folder needs config.json and safetensors weights.",
        ) from fault
    refuse_partial(path, info)
    if quantised is not None and getattr(model, "hf_quantizer", None) is None:
        raise CheckpointError(
            f"{path}/config.json: quantization_config",
            f"{quantised}, which transformers passes over",
            "a quantisation that it knows",
            "Remove it where the weights are plain numbers.",
        )
    if getattr(config, "quantization_config", None) is None:
        refuse_recast(str(path), rows, {name for name, t in model.state_dict().items() if t.is_floating_point()})
    return model


def load_tokenizer(settings: ModelSettings, base_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer; a padding token is chosen where it has none (eos, which the padding mask keeps apart)."""
    path = resolve_base(settings.path, base_dir)
    refuse_absent(path)
    tokenizer = open_tokenizer(path, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"model.path {settings.path}", "a tokenizer without eos", "an end-of-sequence token", "Set eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, tried on a word.

    Raises:
        CheckpointError: there is none, or its files are spoilt.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        tokenizer.encode("word")
    except BaseException as fault:  # a spoilt file makes transformers raise almost anything, and its Rust part a panic
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"tokenizer of {path}",
            " ".join(str(fault).split())[:300] or type(fault).__name__,
            "a tokenizer beside the weights",
            "Add tokenizer.json and tokenizer_config.json to the folder, as they were published.",
        ) from fault
    return tokenizer


def _nf4() -> Any:
    """NF4 with double quantisation and bfloat16 compute (PESC §2.3, as released)."""
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "model.quant: nf4", "no bitsandbytes", "the extra `quant`", "Run: pip install 'sparsmith[quant]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def open_strictly(opener: Any, path: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, what did not fit): sizes that differ are told by name in the second, where the library would print a table and raise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return opener.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    finally:
        logging.set_verbosity(level)


def refuse_partial(where: str | Path, info: dict[str, Any]) -> None:
    """Refuse what `open_strictly` found not to fit.

    Raises:
        CheckpointMismatch: names the first tensor, with the nearest name or both shapes.
    """
    unknown = sorted(map(str, info.get("unexpected_keys") or ()))
    missing = sorted(map(str, info.get("missing_keys") or ()))
    odd = sorted(map(_mismatch, info.get("mismatched_keys") or ()))
    for keys, found in ((missing, "no such tensor"), (unknown, "a tensor that nothing asks for")):
        if keys:
            rest = f" (and {len(keys) - 1} more)" if keys[1:] else ""
            near = (
                nearest(keys[0], unknown)
                if keys is missing and unknown
                else "The folder is incomplete or of another class."
            )
            raise CheckpointMismatch(
                f"{where}: {keys[0]}", found + rest, "every tensor of the architecture, and no other", near
            )
    for name, found, expected in odd:
        raise CheckpointMismatch(
            f"{where}: {name}", f"shape {found}", f"shape {expected}", "config.json belongs to other weights."
        )
    for message in info.get("error_msgs") or ():
        raise CheckpointMismatch(
            str(where), " ".join(str(message).split())[:300], "weights that load", "Fetch them again."
        )


def _mismatch(row: Any) -> tuple[str, str, str]:
    """(name, shape in the file, shape in the model)."""
    name, *shapes = row if isinstance(row, (tuple, list)) else (row,)
    found, expected = [str(tuple(shape)) for shape in shapes] or ["another", "the architecture's"]
    return str(name), found, expected
