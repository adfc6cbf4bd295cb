"""One self-contained Python file from several modules: what a full checkpoint brings along so that torch and
transformers suffice.

The text of the modules is kept (comments and docstrings too), lowest first; what goes is each import of another inlined
module, each `from __future__`, and `__all__`. Anything that could silently mean something else in one file is an error
here, at build time: a name defined by two modules, a foreign package, an internal import of a module that is not
inlined or that is used as a module.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = __name__.split(".")[0]
ALLOWED = frozenset({"torch", "transformers"})
_HEAD = '''"""Model code of this checkpoint: needs torch and transformers, nothing else. Made from {modules} of
{package} {version}.

Open the folder with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or, where {package} is
installed, with `{package}.load(folder)`.
"""

from __future__ import annotations
'''


@dataclass(frozen=True)
class _Edit:
    """Lines `first`..`last` (1-based) become `text`."""

    first: int
    last: int
    text: str


def inline(modules: Sequence[str], version: str = "") -> str:
    """The source of one module that defines everything `modules` define.

    Raises:
        ValueError: the modules cannot be one file without a change of meaning; the message says where.
    """
    owners: dict[str, str] = {}
    sections = []
    for name in modules:
        text = _source_of(name)
        tree = ast.parse(text)
        for defined in _defined_names(tree):
            if owners.setdefault(defined, name) != name:
                raise ValueError(f"{name} defines `{defined}`, which {owners[defined]} defines too")
        _check_bindings(tree, name, owners)
        sections.append(f"# ---- {name.removeprefix(PACKAGE + '.')}\n\n" + _apply(text, _edits(tree, name, modules)))
    head = _HEAD.format(modules=", ".join(modules), package=PACKAGE, version=version).replace("  ", " ")
    result = head + "\n" + "\n\n".join(section.strip() for section in sections) + "\n"
    ast.parse(result)
    return result


def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"no source of {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


def _edits(tree: ast.Module, module: str, modules: Sequence[str]) -> list[_Edit]:
    edits = []
    for node in ast.walk(tree):
        last = getattr(node, "end_lineno", 0) or 0
        indent = " " * getattr(node, "col_offset", 0)
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            edits.append(_Edit(node.lineno, last, ""))
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and _is_internal(node):
            _check_internal(node, module, modules)
            edits.append(_Edit(node.lineno, last, indent + _rename(node)))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            _check_foreign(node, module)
        elif isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            edits.append(_Edit(node.lineno, last, ""))
    if ast.get_docstring(tree, clean=False) is not None:
        doc = tree.body[0]
        lines = ["# " + line if line else "#" for line in (ast.get_docstring(tree) or "").splitlines()]
        edits.append(_Edit(doc.lineno, doc.end_lineno or doc.lineno, "\n".join(lines)))
    return edits


def _apply(text: str, edits: Iterable[_Edit]) -> str:
    lines = text.splitlines()
    for edit in sorted(edits, key=lambda edit: edit.first, reverse=True):
        lines[edit.first - 1 : edit.last] = edit.text.splitlines()
    return "\n".join(lines)


def _is_internal(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == PACKAGE for alias in node.names)
    return node.level > 0 or (node.module or "").split(".")[0] == PACKAGE


def _check_internal(node: ast.Import | ast.ImportFrom, module: str, modules: Sequence[str]) -> None:
    where = f"{module}:{node.lineno}"
    if isinstance(node, ast.Import) or node.level:
        raise ValueError(f"{where}: write `from {PACKAGE}.x import name`, absolute and by name")
    before = modules[: modules.index(module)]
    for alias in node.names:
        if f"{node.module}.{alias.name}" in modules or alias.name == "*":
            raise ValueError(f"{where}: `{alias.name}` is used as a module; import its names instead")
    if node.module not in before:
        raise ValueError(f"{where}: {node.module} is not inlined before {module}")


def _rename(node: ast.Import | ast.ImportFrom) -> str:
    """`pass`, or the assignment that an `as` needs."""
    renamed = [f"{alias.asname} = {alias.name}" for alias in node.names if alias.asname and alias.asname != alias.name]
    return "; ".join(renamed) if renamed else ("pass" if node.col_offset else "")


def _check_foreign(node: ast.Import | ast.ImportFrom, module: str) -> None:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for name in names:
        top = name.split(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ValueError(
                f"{module}:{node.lineno}: imports {top}; only {', '.join(sorted(ALLOWED))} may be used here"
            )


def _defined_names(tree: ast.Module) -> set[str]:
    """Names that the module's top level defines itself (imports aside)."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return names - {"__all__"}


def _check_bindings(tree: ast.Module, module: str, owners: dict[str, str]) -> None:
    """An imported name must mean the same thing in every module, and must not be one that a module defines."""
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or _is_internal(node):
            continue
        home = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            bound = alias.asname or (alias.name if home else alias.name.split(".")[0])
            meaning = f"import {home}{alias.name}" if alias.asname or home else f"import {bound}"
            if owners.setdefault(bound, meaning) != meaning:
                raise ValueError(
                    f"{module}:{node.lineno}: `{bound}` is `{meaning}` here and `{owners[bound]}` elsewhere"
                )
