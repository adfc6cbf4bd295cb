"""The tokenizer beside a base, and the padding token that a classifier shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import anatomy
from sparsmith.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsmith.recipe.schema import ModelSettings


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


def padded(tokenizer: PreTrainedTokenizerBase, path: str, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer with the padding token of the classifier's config."""
    from transformers import AutoConfig

    remote: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    padding = padding_of(path, AutoConfig.from_pretrained(path, **remote), **remote)
    if padding is not None and tokenizer.pad_token_id != padding:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


def padding_of(path: str | Path, config: Any, **remote: Any) -> int | None:
    """The id of the padding token that model and tokenizer shall share.

    Raises:
        CheckpointError: neither config nor tokenizer has a token that can serve.
    """
    own = config.pad_token_id if (config.pad_token_id or 0) >= 0 else None
    if own is not None and anatomy.of(config).reads == "first":
        return own  # an encoder's padding is part of its embeddings
    try:
        tokenizer = open_tokenizer(path, **remote)
    except CheckpointError:
        if own is None:
            raise
        return own
    found = next((one for one in (tokenizer.pad_token_id, own, tokenizer.eos_token_id) if one is not None), None)
    if found is None:
        raise CheckpointError(
            f"tokenizer of {path}",
            "no padding token and no end-of-sequence token",
            "a token that fills up short rows",
            "Set pad_token in tokenizer_config.json.",
        )
    return int(found)
