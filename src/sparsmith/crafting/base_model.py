"""Reading the dense base, strictly: a weight that the file does not hold is an error, never a random tensor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import anatomy
from sparsmith.anatomy.four_bit import hold_as_read
from sparsmith.crafting.base_files import check_base_folder, check_config, refuse_other_size, refuse_recast
from sparsmith.crafting.base_tokenizer import open_tokenizer, padded, padding_of
from sparsmith.crafting.record import BaseRecord, attach_base, labels_of
from sparsmith.errors import (
    CheckpointError,
    CheckpointMismatch,
    CrossLayerStateError,
    EnvironmentFault,
    SparsmithError,
    UnknownAnatomy,
    nearest,
)
from sparsmith.recipe import is_hub_id
from sparsmith.runs import staged_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsmith.crafting.class_head import ClassHead
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


def load_base(
    settings: ModelSettings, base_dir: Path | None = None, *, labels: tuple[str, ...] = (), seed: int = 42
) -> PreTrainedModel:
    """The dense model that a recipe names, in evaluation mode.

    Args:
        labels: of a classifier the names of its classes; () = as the checkpoint has them.
        seed: of a classifier whose checkpoint has no class head: the run's.

    Raises:
        CheckpointError: the folder cannot be read, or is not safe to open.
        CheckpointMismatch: it misses tensors of the architecture, or holds foreign, reshaped or recast ones.
        EnvironmentFault: `quant: nf4` without bitsandbytes.
    """
    import torch

    from sparsmith.crafting.class_head import ClassHead

    path = resolve_base(settings.path, base_dir)
    refuse_absent(path)
    options: dict[str, Any] = {"dtype": "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)}
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    if settings.quant == "nf4":
        options["quantization_config"] = _nf4(classifies=settings.task == anatomy.SEQ_CLS)
    head = ClassHead(settings.num_labels, labels, seed) if settings.num_labels else None
    model = open_base(
        path,
        task=settings.task,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        shown=settings.path,
        head=head,
        **options,
    )
    hold_as_read(model)  # also a folder that was stored in 4 bits
    attach_base(
        model,
        BaseRecord(
            id=_label(settings.path, path),
            folder=Path(path) if Path(path).is_dir() else None,
            revision=settings.revision,
            quant=settings.quant,
            dtype=str(model.dtype).removeprefix("torch."),
            task=settings.task,
            labels=labels_of(model),
        ),
    )
    return model.eval()


def _label(named: str, path: str) -> str:
    """How a record names the base: as the user did; the result of an earlier stage by its place in the run, which may be moved."""
    root = staged_root(path) if Path(path).is_dir() else None
    return Path(path).relative_to(root).as_posix() if root is not None else named


def open_base(
    path: str | Path,
    *,
    task: str = anatomy.CAUSAL_LM,
    revision: str | None = None,
    trust_remote_code: bool = False,
    shown: str = "",
    head: ClassHead | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A model whose files hold exactly what its architecture asks for; of a classifier the class head may be missing whole, and is drawn.

    Args:
        path: a folder or hub id. task: what it is to do. shown: how the user wrote it. head: of a sequence classifier its classes.
            options: for transformers' `from_pretrained`.

    Raises:
        CheckpointError, CheckpointMismatch: as `load_base`.
    """
    import torch
    from transformers import AutoConfig

    shown, folder = f"model.path {shown or path}", Path(path)
    rows = check_base_folder(folder) if folder.is_dir() else {}
    remote: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **remote)
        check_config(shown, {**config.to_dict(), "attn_implementation": config._attn_implementation})
        if head is not None:
            task = anatomy.SEQ_CLS
            row = anatomy.require_task(config, task)
            head.enter(config, padding_of(path, config, **remote))
        else:
            _refuse_other_task(config, task)
            if options.get("quantization_config") is not None:
                options["quantization_config"].llm_int8_skip_modules = _left_whole(config)
        quantised = getattr(config, "quantization_config", None)
        if rows and quantised is None:  # quantised tensors are packed
            refuse_other_size(f"{path}/config.json", config, rows)
        opener = auto_class(task)
        with torch.random.fork_rng(
            enabled=head is not None
        ):  # the library draws a missing head from the global generator
            model, info = open_strictly(opener, path, config=config, use_safetensors=True, **remote, **options)
        if head is not None:
            info = head.settle_info(str(path), row, model, info)
    except SparsmithError:
        raise
    except Exception as fault:  # a broken folder makes transformers raise almost anything
        raise CheckpointError(
            shown,
            " ".join(str(fault).split())[:300],
            "a folder or hub id of a Hugging Face model for this task",
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


def own_task(path: str) -> dict[str, Any]:
    """`task` and `num_labels` of the settings for a folder or hub id, as its own config says; {} where it cannot be read."""
    from transformers import AutoConfig

    from sparsmith.crafting.class_head import ClassHead

    try:
        config = AutoConfig.from_pretrained(path)
        head = ClassHead.of(config)
    except (OSError, ValueError, KeyError):  # told by the load that follows
        return {}
    if anatomy.task_of(config) == anatomy.SEQ2SEQ:
        return {"task": anatomy.SEQ2SEQ}
    return {"task": anatomy.SEQ_CLS, "num_labels": head.classes} if head else {}


def auto_class(task: str) -> Any:
    """The class of transformers that opens a model of the task."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    return {
        anatomy.CAUSAL_LM: AutoModelForCausalLM,
        anatomy.SEQ_CLS: AutoModelForSequenceClassification,
        anatomy.SEQ2SEQ: AutoModelForSeq2SeqLM,
    }[task]


def _refuse_other_task(config: Any, task: str) -> None:
    try:
        anatomy.require_task(config, task)
    except (UnknownAnatomy, CrossLayerStateError):  # told where an anatomy is needed; a plug-in may know it
        return


def load_tokenizer(settings: ModelSettings, base_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer; a padding token is chosen where it has none: of a language model eos, which the padding mask keeps apart, of a
    classifier the one that its config will name."""
    path = resolve_base(settings.path, base_dir)
    refuse_absent(path)
    tokenizer = open_tokenizer(path, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    if settings.task == anatomy.SEQ_CLS:
        return padded(tokenizer, path, settings)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"model.path {settings.path}", "a tokenizer without eos", "an end-of-sequence token", "Set eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _nf4(classifies: bool) -> Any:
    """NF4 with double quantisation and bfloat16 compute (PESC §2.3, as released); a class head, which trains whole, is left as it is."""
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
        llm_int8_skip_modules=["score", "classifier", "pooler"] if classifies else None,
    )


def _left_whole(config: Any) -> list[str] | None:
    """What NF4 leaves as it is, by the ends of names; None = the library's own choice, which is the head.

    Of a shared expert its gate, which is a router; all of one that is empty, which would come out as NaN.
    """
    sparse = anatomy.sparse_shape(config) if anatomy.is_sparse(config) else None
    if sparse is None or sparse.shared is None:
        return None
    empty = () if sparse.shared_linears else ("gate_proj", "up_proj", "down_proj")
    return [anatomy.of(config).head, "shared_expert_gate", *(f"shared_expert.{name}" for name in empty)]


def open_strictly(opener: Any, path: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, what did not fit): sizes that differ are told by name in the second, where the library would print a table and raise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # an empty shared expert
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
