"""The state of an optimiser, a schedule and a loss scaler as safetensors and JSON: nothing here is ever unpickled.

A state dict is a tree of dicts, lists, tuples, numbers, strings and tensors. The tensors go to `optimizer.safetensors` under their path in
the tree, the rest to `tuner.json` with a mark where a tensor was taken out. JSON has no tuples and no keys but strings; both are marked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsmith import durable, ranks
from sparsmith.crafting import tensors as strict
from sparsmith.errors import CheckpointError, CheckpointMismatch, ProofError

TENSORS, TREE = "optimizer.safetensors", "tuner.json"
FORMAT = 1
_TENSOR, _TUPLE, _KEYED = "$tensor", "$tuple", "$integers"
_MARKS = (_TENSOR, _TUPLE, _KEYED)


def write_state(folder: Path, parts: dict[str, Any], *, names: list[str], facts: dict[str, Any]) -> None:
    """Write state dicts into `folder`, which is the temporary one of a durable write.

    Args:
        folder: an existing folder.
        parts: {`optimizer` | `schedule` | `scaler`: its `state_dict()`}.
        names: names of the trained parameters in the optimiser's order; held against the model's at the next read.
        facts: plain figures of the run so far (seconds, tokens).

    Raises:
        CheckpointError: a state holds NaN or infinity.
    """
    strict.write_tensors(folder / TENSORS, write_tree(folder, parts, names=names, facts=facts), {})


def write_tree(folder: Path, parts: dict[str, Any], *, names: list[str], facts: dict[str, Any]) -> dict[str, Tensor]:
    """`write_state` without the tensors, which are returned under the names that the tree has for them."""
    tensors: dict[str, Tensor] = {}
    tree = {name: _packed(state, name, tensors) for name, state in parts.items()}
    text = durable.json_text({"format": FORMAT, "names": names, "facts": facts, "state": tree})
    if ranks.is_first():
        (folder / TREE).write_text(text, encoding="utf-8")
    return tensors


def read_state(
    folder: Path, *, names: list[str] | None = None, read: Callable[[Path], dict[str, Tensor]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parts, facts) as they were written; `names` are those of the parameters that are trained here, `read` gives the folder's tensors.

    Raises:
        CheckpointError: a damaged or foreign file.
        CheckpointMismatch: the state of another set of parameters.
    """
    file = durable.inside(folder, TREE)
    data = durable.read_json(file)
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise CheckpointMismatch(
            f"{file}: format", str(found), str(FORMAT), "Open it with the version of sparsmith that wrote it."
        )
    if names is not None and data.get("names") != names:
        theirs = data.get("names")
        theirs = theirs if isinstance(theirs, list) else []
        differ = [name for name in [*theirs, *names] if (name in theirs) != (name in names)]
        raise CheckpointMismatch(
            f"{file}: names",
            f"{len(theirs)} parameters ("
            + (f"`{differ[0]}` stands on one side only" if differ else "another order")
            + ")",
            f"the {len(names)} that are trained here",
            "Resume with the recipe that wrote the checkpoint.",
        )
    tensors = strict.read_tensors(durable.inside(folder, TENSORS)) if read is None else read(folder)
    taken: set[str] = set()
    try:
        parts = {name: _unpacked(tree, tensors, taken) for name, tree in data["state"].items()}
        facts = {str(name): value + 0 for name, value in data["facts"].items()}  # numbers, or a TypeError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            str(file),
            f"no state of an optimiser ({error!r})",
            "the file as it was written",
            "Take an earlier checkpoint.",
        ) from error
    if left := sorted(set(tensors) - taken):
        raise CheckpointMismatch(
            str(folder / TENSORS), f"`{left[0]}`", f"only what {TREE} names", "Take another checkpoint."
        )
    return parts, facts


def state_bytes(state: Any) -> int:
    """Bytes of the tensors in a state dict."""
    tensors: dict[str, Tensor] = {}
    _packed(state, "", tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def parameter_names(model: nn.Module, optimizer: Any) -> list[str]:
    """Names of the optimiser's parameters in its order."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known.get(id(p), "?") for group in optimizer.param_groups for p in group["params"]]


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {_TENSOR: path}
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_packed(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, dict):
        packed = {str(key): _packed(item, f"{path}.{key}", tensors) for key, item in value.items()}
        if value and all(type(key) is int for key in value):
            return {_KEYED: packed}
        if all(isinstance(key, str) and key not in _MARKS for key in value):
            return packed
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ProofError(
        path,
        f"a {type(value).__name__} in the state of an optimiser",
        "tensors, numbers, strings, lists and dicts",
        "Choose another `train.optimizer`; its state cannot be saved without pickle.",
    )


def _unpacked(value: Any, tensors: dict[str, Tensor], taken: set[str]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors, taken) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_TENSOR}:
        taken.add(value[_TENSOR])
        return tensors[value[_TENSOR]]
    if set(value) == {_TUPLE}:
        return tuple(_unpacked(item, tensors, taken) for item in value[_TUPLE])
    if set(value) == {_KEYED}:
        return {int(key): _unpacked(item, tensors, taken) for key, item in value[_KEYED].items()}
    return {key: _unpacked(item, tensors, taken) for key, item in value.items()}
