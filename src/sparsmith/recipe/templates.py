"""Template files: pairs of an input and a target pattern, as data.

    about: Questions with options.
    patterns:
      - {input: "{question}\\n\\n{options_}", target: "{answer}"}
      - {input: "Q: {question}\\n{options_}\\nA:", target: "{answer}", join: " ", between: "\\n"}

A pattern holds text and fields, `{name}`, and nothing else: no attributes, indices, formats or conversions, so that a file cannot reach
past the texts of a row. `{options_}` is where the options stand; `{{` and `}}` are braces. What a field holds is put in as it stands;
braces in it are text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from sparsmith.errors import RecipeError, RecipeErrors, nearest
from sparsmith.recipe.faults import report
from sparsmith.recipe.strict import Clash, StrictModel
from sparsmith.recipe.yaml_tree import decode, parse

SHIPPED = Path(__file__).parent / "pattern_sets"
OPTIONS = "options_"
FIELD = re.compile(r"[A-Za-z](?:[A-Za-z0-9_]{0,62}[A-Za-z0-9])?")
"""A field's name."""
RESERVED = (OPTIONS,)
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_MAX_PATTERNS = 200
Pattern = Annotated[str, Field(min_length=1, max_length=8000)]
Gap = Annotated[str, Field(min_length=1, max_length=200)]
Piece = tuple[str, str | None]


class PatternEntry(StrictModel):
    """One way of asking."""

    input: Pattern
    target: Pattern
    lead: Annotated[str, Field(max_length=8000)] | None = None
    """Said once, before worked examples and question."""
    join: Gap | None = None
    """Between the input and the target of a worked example; absent = the file's."""
    between: Gap | None = None
    """Between worked examples; absent = the file's."""

    def clashes(self) -> Iterable[Clash]:
        for key in ("input", "target", "lead"):
            text = getattr(self, key)
            fault = "" if text is None else fault_of(text, key)
            if fault:
                yield Clash(key, fault, "text with fields `{name}`; braces doubled", "Mend the pattern.")
        if self.lead is not None and not self.lead.strip():
            yield Clash("lead", "no text", "a text", "Remove `lead`.")


class TemplateFile(StrictModel):
    """A file of patterns."""

    about: str | None = None
    """For readers."""
    join: Gap = "\n"
    between: Gap = "\n\n"
    patterns: Annotated[tuple[PatternEntry, ...], Field(min_length=1, max_length=_MAX_PATTERNS)]


@dataclass(frozen=True)
class Template:
    """A pattern, taken apart into (literal, field) pieces."""

    input: tuple[Piece, ...]
    target: tuple[Piece, ...]
    lead: tuple[Piece, ...]
    join: str
    between: str

    @property
    def shows_options(self) -> bool:
        return any(name == OPTIONS for _, name in self.input)

    @property
    def asked(self) -> tuple[str, ...]:
        """The fields of the input."""
        return tuple(dict.fromkeys(name for _, name in self.input if name and name != OPTIONS))

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that it reads of a row."""
        pieces = (*self.lead, *self.input, *self.target)
        return tuple(dict.fromkeys(name for _, name in pieces if name and name != OPTIONS))


@dataclass(frozen=True)
class TemplateSet:
    """The templates of a file."""

    name: str
    templates: tuple[Template, ...]
    digest: str
    """sha256 of what they say."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that any of them reads of a row."""
        return tuple(dict.fromkeys(name for one in self.templates for name in one.fields))

    @property
    def shows_options(self) -> bool:
        return any(one.shows_options for one in self.templates)


def pieces_of(text: str) -> tuple[Piece, ...]:
    """(literal, field or None) of a pattern that has no fault."""
    result: list[Piece] = []
    literal, start = "", 0
    for found in _PIECE.finditer(text):
        literal += text[start : found.start()]
        start = found.end()
        if found.group(1) is None:
            literal += found.group()[0]
        else:
            result.append((literal, found.group(1)))
            literal = ""
    literal += text[start:]
    return (*result, (literal, None)) if literal else tuple(result)


def fault_of(text: str, key: str) -> str:
    """What is wrong with a pattern, or nothing."""
    names = []
    for found in _PIECE.finditer(text):
        if found.group() in ("{{", "}}"):
            continue
        name = found.group(1)
        if name is None:
            return f"a single `{found.group()}`"
        if name not in RESERVED and not FIELD.fullmatch(name):
            return f"the field `{{{name[:60]}}}`, which is no name"
        names.append(name)
    if OPTIONS in names and key != "input":
        return "`{options_}` outside the input"
    if names.count(OPTIONS) > 1:
        return "`{options_}` twice"
    if key != "lead" and not [name for name in names if name != OPTIONS]:
        return "no field"
    return ""


def shipped_names() -> list[str]:
    """The sets that come with sparsmith."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def is_file_name(text: str) -> bool:
    """True where `templates` names a file and no set of ours."""
    return text.endswith((".yaml", ".yml", ".json")) or "/" in text


def load_templates(name: str, base_dir: Path) -> TemplateSet:
    """The set of a name, or of a file relative to `base_dir`.

    Raises:
        RecipeErrors: an unknown name, no such file, or every fault of the file, each with file and line.
    """
    if not is_file_name(name):
        if name not in shipped_names():
            hint = nearest(name, shipped_names())
            raise RecipeErrors([RecipeError(name, "no set of templates of this name", "a shipped set or a file", hint)])
        return _read(SHIPPED / f"{name}.yaml", name)
    try:
        return _read((base_dir / Path(name).expanduser()).resolve(), name)
    except (ValueError, RuntimeError):
        raise RecipeErrors([RecipeError(name, "no path", "a file of templates", "Check `templates`.")]) from None


def _read(path: Path, name: str) -> TemplateSet:
    try:
        if path.stat().st_size > 2**20:
            found, mend = f"{path.stat().st_size} bytes", "Is this a file of templates?"
            raise RecipeErrors([RecipeError(name, found, "at most 1 MiB", mend)])
        raw = path.read_bytes()
    except OSError as fault:
        found = f"no readable file ({fault.strerror})"
        raise RecipeErrors([RecipeError(name, found, "a file of templates", "Check `templates`.")]) from None
    return parse_templates(raw, name)


@lru_cache(maxsize=256)
def parse_templates(raw: bytes, name: str) -> TemplateSet:
    """The templates that a file says.

    Raises:
        RecipeErrors: every fault, each with file and line.
    """
    try:
        tree = parse(decode(raw, name), name)
    except RecipeError as error:
        raise RecipeErrors([error]) from None
    made = None
    if isinstance(tree.data, dict):
        try:
            made = TemplateFile.model_validate_json(json.dumps(tree.data), strict=True)
        except ValidationError as error:
            report(tree, error.errors(), TemplateFile, {})
    else:
        tree.fault((), "no settings", "`patterns: [{input: ..., target: ...}]`", "Write the patterns as a list.")
    if tree.faults or made is None:
        raise RecipeErrors(tree.faults)
    templates = tuple(
        Template(
            input=pieces_of(one.input),
            target=pieces_of(one.target),
            lead=pieces_of(one.lead or ""),
            join=one.join or made.join,
            between=one.between or made.between,
        )
        for one in made.patterns
    )
    digest = hashlib.sha256(repr([(t.input, t.target, t.lead, t.join, t.between) for t in templates]).encode())
    return TemplateSet(name, templates, digest.hexdigest())
