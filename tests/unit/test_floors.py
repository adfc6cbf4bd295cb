"""The floors of docs/design.md: a file imports only from lower floors or its own folder, files and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sparsmith

SRC = Path(sparsmith.__file__).parent
FLOORS = {
    "errors": 1,
    "seeds": 1,
    "fingerprints": 1,
    "manifests": 1,
    "durable": 1,
    "bootstrap": 1,
    "auto": 1,
    "runs": 1,
    "ranks": 1,
    "ops": 1,
    "anatomy": 2,
    "recipe": 2,
    "methods": 3,
    "data": 3,
    "embedded": 3,
    "crafting": 4,
    "training": 5,
    "inference": 5,
    "exporting": 5,
    "evaluating": 6,
    "reporting": 6,
    "protocols": 6,
    "app": 7,
    "cli": 8,
}
FACE = {"__init__", "__main__"}  # the face loads names of every floor, lazily
FILES = sorted(SRC.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 450, 80
HEAVY = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "pyarrow", "pandas", "numpy"]


def name_of(path: Path) -> str:
    """Dotted name below the package."""
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path, at_import_only: bool = False) -> set[str]:
    """Modules of ours that a file imports, function-level ones included, `TYPE_CHECKING` ones not."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if at_import_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import"
                found.update(_modules(child))
            walk(child)

    walk(tree_of(path))
    return {name.removeprefix("sparsmith.") for name in found if name.startswith("sparsmith.")}


def _modules(node: ast.ImportFrom) -> list[str]:
    """`from sparsmith.a import b` means the module a.b where there is one, else a."""
    known = modules()
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name.removeprefix("sparsmith.") in known else str(node.module) for name in names]


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in FILES if path.parent != SRC or path.stem not in FACE}


def test_every_part_has_a_floor():
    parts = {path.relative_to(SRC).parts[0].removesuffix(".py") for path in FILES} - FACE
    assert parts <= set(FLOORS), f"give a floor to {parts - set(FLOORS)}"


@pytest.mark.parametrize("path", modules().values(), ids=list(modules()))
def test_no_import_to_a_higher_floor(path: Path):
    own = name_of(path).split(".")[0]
    for name in imports_of(path):
        other = name.split(".")[0]
        assert other == own or FLOORS[other] <= FLOORS[own], f"{name_of(path)} (floor {FLOORS[own]}) imports {name}"


def test_no_part_circles():
    """Parts of one floor may use each other one way only."""
    arrows: dict[str, set[str]] = {}
    for name, path in modules().items():
        arrows.setdefault(name.split(".")[0], set()).update(other.split(".")[0] for other in imports_of(path))
    _assert_no_circle({part: others - {part} for part, others in arrows.items()})


def test_no_import_circle():
    _assert_no_circle({name: imports_of(path, at_import_only=True) - {name} for name, path in modules().items()})


def _assert_no_circle(arrows: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=map(name_of, FILES))
def test_files_and_functions_are_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{node.name} has {lines} lines"


def test_no_code_is_read_from_files():
    """No pickle, no unsafe YAML, no eval."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}, (
                    path
                )
                if called == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


@pytest.mark.parametrize(
    "code",
    [
        "import sparsmith",
        "from sparsmith.cli import main; assert main(['--help']) == 0",
        "from sparsmith.cli import main; assert main(['data', 'overlap', '--help']) == 0",
        "import sparsmith.errors, sparsmith.recipe, sparsmith.methods.base; from sparsmith.methods import registry; "
        "registry.config_classes()",
    ],
    ids=["import", "help", "help of a verb", "recipe"],
)
def test_light_imports(code: str):
    check = f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
