"""A dense checkpoint that is read tensor by tensor: its files checked first, then one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsmith import anatomy, durable
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.base_files import Rows, check_base_folder, shards
from sparsmith.crafting.base_model import open_base, refuse_absent, resolve_base
from sparsmith.crafting.base_tokenizer import open_tokenizer
from sparsmith.errors import CheckpointError, CheckpointMismatch, nearest

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_FOLLOWS = "rotary_emb.inv_freq"  # a buffer that old checkpoints of the Llama family hold; it follows from the config
_ROWS = 4096  # of embeddings and head, compared at a time


@dataclass(frozen=True)
class Donor:
    """A dense checkpoint whose files hold exactly what its config.json asks for."""

    folder: Path
    revision: str | None
    model: Any
    """On the meta device, in the number type that its config names."""
    files: tuple[tuple[Path, tuple[str, ...]], ...]
    """(file, names of the tensors that are taken from it)."""
    shapes: dict[str, tuple[int, ...]]
    """Name -> shape of every tensor that is taken, in the order of reading."""


def open_donor(folder: Path, shown: str, revision: str | None = None) -> Donor:
    """Check a dense checkpoint; reads headers alone.

    Args:
        shown: the donor, as the user named it. revision: of a hub id.

    Raises:
        CheckpointError, CheckpointMismatch: the files are damaged, unsafe, or not what config.json asks for.
    """
    model = open_base(folder, shown=shown, device_map="meta", dtype="auto")
    rows = check_base_folder(folder)
    taken = _taken(folder, rows, model)
    files: list[tuple[Path, tuple[str, ...]]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for file, _ in shards(folder):
        names = tuple(name for name in strict.read_rows(file) if name in taken and name not in shapes)
        files.append((file, names))
        shapes |= {name: rows[name][0] for name in names}
    return Donor(folder, revision, model, tuple(files), shapes)


def read(donor: Donor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that is taken, one file open at a time.

    Raises:
        CheckpointError: a file that cannot be read, or a number that is not finite.
    """
    for file, names in donor.files:
        try:
            with safe_open(file, "pt") as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    _check_finite(file, name, tensor)
                    yield name, tensor
                    del tensor  # before the next is read
        except (SafetensorError, OSError) as fault:
            found, mend = f"no readable safetensors file ({fault})", "Fetch the base again."
            raise CheckpointError(str(file), found, "a safetensors file", mend) from fault


def copy_tokenizer(source: Path, folder: Path) -> Any:
    """The donor's tokenizer, written beside the weights: its files as they are, where they name their class. None where it has none."""
    if not (source / TOKENIZER_CONFIG).is_file():
        return None
    tokenizer = open_tokenizer(source)
    if not (durable.read_json(durable.inside(source, TOKENIZER_CONFIG)) or {}).get("tokenizer_class"):
        tokenizer.save_pretrained(folder)  # its class was told by the donor's family, which the mixture is not
        return tokenizer
    for file in sorted(source.iterdir()):
        if file.name.startswith(_TOKENIZER) and file.suffix in _SUFFIXES and file.is_file():
            shutil.copyfile(durable.inside(source, file.name), folder / file.name)
    return tokenizer


def folder_of(base: str, revision: str | None = None) -> Path:
    """Where the files of a folder, a hub id or `embedded` lie; those of a hub id are fetched first.

    Raises:
        CheckpointError.
    """
    path = resolve_base(base)
    refuse_absent(path)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as fault:
        found = " ".join(str(fault).split())[:300]
        raise CheckpointError(
            f"model.path {base}", found, "a hub id that can be fetched", "Check the name and the network."
        ) from fault


def _taken(folder: Path, rows: Rows, model: Any) -> set[str]:
    """Names of the tensors that the mixture is made of; a second copy of tied weights is left out."""
    asked = set(model.state_dict())
    taken = {name for name in rows if not name.endswith(_FOLLOWS)}
    if strange := sorted(taken - asked):
        raise CheckpointMismatch(
            f"{folder}: {strange[0]}",
            "a tensor's name of another layout",
            f"the names of {type(model).__name__}",
            nearest(strange[0], sorted(asked)) + " Open it with transformers and save it again.",
        )
    row = anatomy.of(model.config)
    head, embeddings = f"{row.head}.weight", f"{row.embeddings}.weight"
    if model.config.tie_word_embeddings and head in taken:
        if embeddings in taken:
            _check_tied(folder, head, embeddings, rows)
            taken.discard(head)
        else:
            raise CheckpointMismatch(
                f"{folder}: {embeddings}", "no such tensor", "the embeddings", f"The files hold {head} alone."
            )
    return taken


def _check_tied(folder: Path, head: str, embeddings: str, rows: Rows) -> None:
    """Both are in the files: they must be the same numbers, or one of them would be lost."""
    where = {name: file for file, _ in shards(folder) for name in strict.read_rows(file) if name in (head, embeddings)}
    same = rows[head][0] == rows[embeddings][0]
    for start in range(0, rows[head][0][0], _ROWS) if same else ():
        one, other = (strict.read_rows_of(where[n], n, start, start + _ROWS) for n in (head, embeddings))
        same = same and torch.equal(one, other.to(one.dtype))
    if not same:
        raise CheckpointMismatch(
            f"{folder}: {head}",
            f"other numbers than {embeddings}",
            "the same, as config.json says tie_word_embeddings",
            "Set tie_word_embeddings to false in config.json, or remove the head from the files.",
        )


def _check_finite(file: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{file}: {name}", "NaN or infinity", "finite numbers", "Fetch the base again.")
