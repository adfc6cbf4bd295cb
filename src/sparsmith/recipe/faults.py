"""pydantic's errors -> ours: place, found, expected, mend, with the nearest known name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from sparsmith.errors import nearest
from sparsmith.recipe.strict import Clashes
from sparsmith.recipe.yaml_tree import Path, Tree, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a group of settings (`key: value`)",
    "model_type": "a group of settings (`key: value`)",
    "model_attributes_type": "a group of settings (`key: value`)",
    "tuple_type": "a list",
    "list_type": "a list",
    "none_required": "nothing (null)",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "a word of letters, digits and _ . + -",
    "literal_error": "{expected}",
    "enum": "{expected}",
}


def report(tree: Tree, errors: Iterable[ErrorDetails], root: type[BaseModel], methods: Mapping[str, type]) -> None:
    """Add one fault per path (branches of a union are told together)."""
    guide = Guide(root, methods, tree)
    told = {fault.where for fault in tree.faults}  # by the reader of the text, whose stand-in value need not fit
    by_path: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_real_path(tree.data, error), []).append(error)
    for path, group in by_path.items():
        if tree.where(path) not in told and not _is_echo(path, group[0], by_path, tree):
            _report_one(tree, path, group, guide)


def _is_echo(path: Path, error: ErrorDetails, by_path: Iterable[Path], tree: Tree) -> bool:
    """True for an error that only repeats a deeper one: another branch of a union, or a list counted without its faulty entries."""
    deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
    entries = tree.get(path)
    return deeper and (error["type"] != "too_short" or (isinstance(entries, list) and len(entries) > 0))


def _report_one(tree: Tree, path: Path, errors: list[ErrorDetails], guide: Guide) -> None:
    kind, context = errors[0]["type"], errors[0].get("ctx", {})
    cause = context.get("error")
    if kind == "extra_forbidden":
        known = guide.keys(path[:-1])
        group = dotted(path[:-1]) or "a recipe"
        tree.fault(path, f"the unknown key `{path[-1]}`", f"a key of {group}", nearest(str(path[-1]), known))
    elif kind == "missing":
        tree.fault(path, "nothing", guide.wanted(path), f"Add `{path[-1]}`.{guide.doc(path)}")
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        _report_method(tree, path, kind == "union_tag_not_found", tuple(guide.methods))
    elif isinstance(cause, Clashes):
        for clash in cause.clashes:
            tree.fault((*path, *clash.key.split(".")), clash.found, clash.expected, clash.mend)
    elif cause is not None:
        tree.fault(path, show(tree.get(path)), str(cause), "Change one of the settings.")
    else:
        found = tree.get(path)
        expected = " or ".join(dict.fromkeys(_expected(error) for error in errors))
        tree.fault(path, show(found), expected, _mend(path, found, context, guide))


def _report_method(tree: Tree, path: Path, absent: bool, names: tuple[str, ...]) -> None:
    """An entry of `methods` whose key `method` is missing, misspelt or unknown."""
    name, known = tree.get((*path, "method")), "Known: " + ", ".join(names) + "."
    if not absent:
        hint = nearest(name, names) if isinstance(name, str) else known
        tree.fault((*path, "method"), show(name), "the name of a method", hint)
        return
    misspelt = get_close_matches("method", list(tree.get(path) or ()), n=1)
    if misspelt:
        tree.fault(
            (*path, misspelt[0]), f"the unknown key `{misspelt[0]}`", "the key `method`", "Did you mean `method`?"
        )
    else:
        tree.fault((*path, "method"), "nothing", "the name of a method", known)


def _expected(error: ErrorDetails) -> str:
    template = _EXPECTED.get(error["type"])
    if template is None:
        return error["msg"]
    try:
        return template.format(**error.get("ctx", {}))
    except KeyError:
        return error["msg"]


def _mend(path: Path, found: Any, context: dict, guide: Guide) -> str:
    doc = guide.doc(path)
    choices = [choice.strip(" '") for choice in str(context.get("expected", "")).replace(" or ", ",").split(",")]
    if isinstance(found, str) and len(choices) > 1:
        return f"{nearest(found, choices)}{doc}"
    return f"Change `{dotted(path)}`.{doc}" if path else "Write the settings as `key: value`."


def show(value: Any) -> str:
    """A value as a person would write it, cut to a line."""
    if value is None:
        return "nothing (null)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    text = text if len(text) <= 60 else text[:57] + "..."
    return f'the text "{text}"' if isinstance(value, str) else f"`{text}`"


def _real_path(data: Any, error: ErrorDetails) -> Path:
    """The error's place without pydantic's labels of union branches."""
    path: list[str | int] = []
    value, parts = data, error["loc"]
    for index, part in enumerate(parts):
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, dict) and part in value):
            value = value[part]
        elif error["type"] != "missing" or index < len(parts) - 1:
            continue
        path.append(part)
    return tuple(path)


class Guide:
    """Finds the settings classes that stand along a path, for names, kinds and docs."""

    def __init__(self, root: type[BaseModel], methods: Mapping[str, type], tree: Tree) -> None:
        self.root, self.methods, self.tree = root, methods, tree

    def keys(self, path: Path) -> list[str]:
        """The keys that the group at the path may have."""
        return [name for model in self.models(path) for name in model.model_fields]

    def wanted(self, path: Path) -> str:
        """What kind of value the missing key takes, in words."""
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        field = self._field(path)
        return words.get(field.annotation, "a value") if field else "a value"

    def doc(self, path: Path) -> str:
        """The docstring of a setting, as a sentence to append."""
        field = self._field(path)
        text = " ".join((field.description or "").split()) if field else ""
        return f" {path[-1]}: {text}" if text else ""

    def _field(self, path: Path) -> Any:
        if not path or isinstance(path[-1], int):
            return None
        found = [model.model_fields[path[-1]] for model in self.models(path[:-1]) if path[-1] in model.model_fields]
        return found[0] if found else None

    def models(self, path: Path) -> list[type[BaseModel]]:
        """The settings classes that a group at the path may be."""
        current: list[type[BaseModel]] = [self.root]
        for index, part in enumerate(path):
            if path[:index] == ("methods",):
                name = self.tree.get((*path[: index + 1], "method"))
                current = [self.methods[name]] if isinstance(name, str) and name in self.methods else []
            elif isinstance(part, str):
                fields = [model.model_fields[part] for model in current if part in model.model_fields]
                current = [model for field in fields for model in _models_in(field.annotation)]
        return current


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
