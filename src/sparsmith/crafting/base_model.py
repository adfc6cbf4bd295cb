"""Reading the dense base, strictly: a weight that the file does not hold is an error, never a random tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.crafting.record import BaseRecord, attach_base
from sparsmith.errors import CheckpointError, EnvironmentFault, MethodError
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
        CheckpointError: the folder misses tensors of the architecture, holds foreign ones, or cannot be read.
        EnvironmentFault: `quant: nf4` without bitsandbytes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if settings.task != "causal_lm":
        raise MethodError(
            "model.task", settings.task, "causal_lm", "No installed method tunes a classifier; use task causal_lm."
        )
    path = resolve_base(settings.path, base_dir)
    refuse_absent(path)
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        options["dtype"] = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
        if settings.attention != "auto":
            options["attn_implementation"] = settings.attention
        if settings.quant == "nf4":
            options["quantization_config"] = _nf4()
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, output_loading_info=True, **options)
    except Exception as fault:  # a broken folder makes transformers raise almost anything
        reason = " ".join(str(fault).split())[:300]
        raise CheckpointError(
            f"model.path {settings.path}",
            reason,
            "a folder or hub id of a Hugging Face causal language model",
            "Check the path; a folder needs config.json and safetensors weights.",
        ) from fault
    model, info = loaded
    _refuse_partial(path, info)
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


def load_tokenizer(settings: ModelSettings, base_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer; a padding token is chosen where it has none (eos, which the padding mask keeps apart)."""
    from transformers import AutoTokenizer

    path = resolve_base(settings.path, base_dir)
    refuse_absent(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise CheckpointError(
            f"model.path {settings.path}", reason, "a tokenizer beside the weights", "Add tokenizer.json to the folder."
        ) from fault
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"model.path {settings.path}", "a tokenizer without eos", "an end-of-sequence token", "Set eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
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


def _refuse_partial(path: str, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(
                path,
                f"{kind.replace('_', ' ')}: {shown}",
                "every tensor of the architecture, and no other",
                "The folder is incomplete or of another class; fetch it again.",
            )
