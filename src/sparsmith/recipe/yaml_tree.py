"""YAML text -> plain data that remembers the line of every key.

The scalars are those of YAML 1.2 (`yes` is text, `3e-3` is a number); tags, merge keys, duplicate keys and recursion are faults, and
nothing of a file is ever constructed as an object. All faults of a file are collected, except that a syntax error is alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from sparsmith.errors import RecipeError

Path = tuple[str | int, ...]
_MAX_DEPTH = 40
_MAX_NODES = 20_000
_MAX_BYTES = 1 << 20
_SCALARS = {  # tag -> what a plain scalar of it looks like; the rest is text
    "tag:yaml.org,2002:null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "tag:yaml.org,2002:int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """Only composes nodes; constructs nothing."""

    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Writes text that `_Loader` reads back as the same kind."""

    yaml_implicit_resolvers: dict = {}

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)


@dataclass
class Tree:
    """Plain data, and for each path the place (`file:line`) where its key stands."""

    name: str
    data: Any = None
    places: dict[Path, str] = field(default_factory=dict)
    faults: list[RecipeError] = field(default_factory=list)

    def place(self, path: Path) -> str:
        """The place of a path, or of the nearest group around it that the text has."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return f"{self.name}:1"

    def where(self, path: Path) -> str:
        """`file:line: key`."""
        return f"{self.place(path)}: {dotted(path)}" if path else self.place(path)

    def fault(self, path: Path, found: str, expected: str, mend: str) -> None:
        self.faults.append(RecipeError(self.where(path), found, expected, mend))

    def get(self, path: Path) -> Any:
        """The value at a path, or None."""
        value = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def set(self, path: Path, value: Any, place: str) -> None:
        """Put a value in an existing group or list, and remember where it came from."""
        self.get(path[:-1])[path[-1]] = value
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        self.places[path] = place


def dotted(path: Path) -> str:
    """`data.train.0.path`."""
    return ".".join(map(str, path))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def decode(raw: bytes, name: str) -> str:
    """The text of a recipe file, or the fault that it is none."""
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{name}:1", f"{len(raw)} bytes", f"at most {_MAX_BYTES}", "Is this file a recipe?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{name}:{line}", f"byte 0x{raw[error.start]:02x}", "text in UTF-8", "Save the file as UTF-8."
        ) from None


def parse(text: str, name: str) -> Tree:
    """The data of one YAML document; faults of single keys are in `tree.faults`, a syntax error is raised."""
    tree = Tree(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError(
            f"{name}:{line}", error.problem or "unreadable YAML", "valid YAML", "Mend the syntax here."
        ) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(
            f"{name}:{line}", f"the character {error.character!r}", "printable text", "Remove the character."
        ) from None
    except (RecursionError, ValueError, AttributeError) as error:
        raise RecipeError(f"{name}:1", f"unreadable YAML ({error})", "valid YAML", "Mend the syntax.") from None
    if node is not None:
        tree.data = _Builder(tree).build(node, (), ())
    return tree


def parse_value(text: str, place: str) -> Any:
    """A single value as YAML (of an override)."""
    try:
        tree = parse(text, place)
        faults = tree.faults
    except RecipeError as error:
        faults = [error]
    if faults:
        raise RecipeError(place, faults[0].found, faults[0].expected, faults[0].mend)
    return tree.data


class _Builder:
    """Walks the composed nodes once."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.nodes = tree, 0

    def build(self, node: yaml.Node, path: Path, inside: tuple[int, ...]) -> Any:
        line = f"{self.tree.name}:{node.start_mark.line + 1}"
        self.tree.places.setdefault(path, line)
        self.nodes += 1
        if id(node) in inside or len(path) > _MAX_DEPTH or self.nodes > _MAX_NODES:
            raise RecipeError(
                f"{line}: {dotted(path)}", "values nested or repeated without end", "a plain recipe", "Write it out."
            )
        inside = (*inside, id(node))
        if isinstance(node, yaml.MappingNode):
            self.own_tag(node, path, "tag:yaml.org,2002:map")
            return self.mapping(node, path, inside)
        if isinstance(node, yaml.SequenceNode):
            self.own_tag(node, path, "tag:yaml.org,2002:seq")
            return [self.build(item, (*path, index), inside) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: Path, inside: tuple[int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.key(key_node, path)
            if key is None:
                continue
            if key in result:
                first = self.tree.place((*path, key))
                fault = f"{self.tree.name}:{line}: {dotted((*path, key))}"
                mend = f"Remove one; the first stands at {first}."
                self.tree.faults.append(RecipeError(fault, "the key a second time", "each key once", mend))
                continue
            self.tree.places[(*path, key)] = f"{self.tree.name}:{line}"
            result[key] = self.build(value_node, (*path, key), inside)
        return result

    def key(self, node: yaml.Node, path: Path) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str" and node.value != "<<":
            return self.text(node, path)
        shown = f"`{node.value}`" if isinstance(node, yaml.ScalarNode) else "a list or group"
        where = f"{self.tree.name}:{node.start_mark.line + 1}: {dotted(path) or '(top)'}"
        mend = "Write the key as a word (in quotes where it looks like a number)."
        self.tree.faults.append(RecipeError(where, f"the key {shown}", "a name", mend))
        return None

    def own_tag(self, node: yaml.Node, path: Path, tag: str) -> None:
        if node.tag != tag:
            self.tree.fault(path, f"the YAML tag {node.tag}", "plain values", "Remove the tag.")

    def text(self, node: yaml.ScalarNode, path: Path) -> str:
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
            self.tree.fault(path, "a character that no text holds", "text", "Remove the escape.")
            return "?"
        return node.value

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        value = node.value
        match node.tag:
            case "tag:yaml.org,2002:str":
                return self.text(node, path)
            case "tag:yaml.org,2002:null" if re.match(_SCALARS[node.tag][0], value):
                return None
            case "tag:yaml.org,2002:bool" if re.match(_SCALARS[node.tag][0], value):
                return value.lower() == "true"
            case "tag:yaml.org,2002:int" if re.match(_SCALARS[node.tag][0], value) and len(value) < 100:
                return int(value, 0) if value[:2] in ("0x", "0o") else int(value)
            case "tag:yaml.org,2002:float" if re.match(_SCALARS[node.tag][0], value) and len(value) < 100:
                return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
        self.tree.fault(
            path, f"`{value[:40]}` as {node.tag}", "a plain value", "Remove the tag, or write another value."
        )
        return None
