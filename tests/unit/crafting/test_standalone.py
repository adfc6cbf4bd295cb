"""The self-contained model file: everything in, nothing of ours imported, and no silent change of meaning."""

from __future__ import annotations

import ast
import sys

import pytest

from sparsmith.crafting import standalone
from sparsmith.methods import registry


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Write modules of a make-believe package and let the inliner find them."""
    monkeypatch.setattr(standalone, "PACKAGE", "forge")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "forge").mkdir()
    (tmp_path / "forge" / "__init__.py").write_text("")

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / "forge" / f"{name}.py").write_text(text)
        return [f"forge.{name}" for name in texts]

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "forge"]:
        del sys.modules[name]


LOW = '''"""Low."""
from __future__ import annotations
import math
__all__ = ["area"]
# a remark
def area(r):
    return math.pi * r * r
'''


def test_every_methods_sources_inline_without_a_trace_of_the_package():
    for name in registry.names():
        sources = registry.get(name).standalone_sources()
        if not sources:
            continue
        text = standalone.inline(sources, "1.2")
        tree = ast.parse(text)
        imported = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not [name for name in imported if name.startswith("sparsmith")]
        assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) <= {"torch", "transformers"}
        assert ast.get_docstring(tree) and text.count("from __future__") == 1
        compile(text, name, "exec")


def test_texts_are_joined_in_order_with_comments_and_lazy_imports(modules):
    high = (
        '"""High."""\nfrom __future__ import annotations\nimport math\nfrom typing import TYPE_CHECKING\n'
        "from forge.low import area, area as disc\nif TYPE_CHECKING:\n    from forge.low import area\n"
        "def ring(a, b):\n    from forge.low import area\n    return disc(a) - area(b) + math.tau * 0\n"
    )
    text = standalone.inline(modules(low=LOW, high=high))
    assert (
        "# a remark" in text
        and "# Low." in text
        and "forge" not in text.split("from __future__")[1].replace("forge.", "")
    )
    names: dict = {}
    exec(compile(text, "one", "exec"), names)
    assert names["ring"](2, 1) == pytest.approx(3 * 3.14159265, rel=1e-6)


@pytest.mark.parametrize(
    "high, reason",
    [
        ("def area(x):\n    return 0\n", "defines `area`, which forge.low defines too"),
        ("from forge.other import x\n", "not inlined before"),
        ("from forge import low\n", "used as a module"),
        ("import forge.low\n", "absolute and by name"),
        ("from .low import area\n", "absolute and by name"),
        ("from forge.low import *\n", "used as a module"),
        ("import numpy\n", "imports numpy"),
        ("import cmath as math\n", "`math` is"),
    ],
)
def test_what_would_change_its_meaning_is_refused(modules, high, reason):
    with pytest.raises(ValueError, match=reason):
        standalone.inline(modules(low=LOW, high=high))
