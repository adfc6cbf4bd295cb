"""`protocol`: a paper's comparison as one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.app.recipes import load_recipe
from sparsmith.errors import UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

PROTOCOLS = ("pesc",)


def protocol(
    name: str,
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    controls: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    console: Console | None = None,
) -> Any:
    """Run a comparison in the recipe's `output` folder, one run per control and seed; a finished run is not repeated.

    Returns:
        The comparison, with `table()`, `markdown()` and `as_dict()`.
    """
    if name not in PROTOCOLS:
        raise UsageError("protocol", f"`{name}`", "a known protocol", nearest(name, PROTOCOLS))
    from sparsmith.app.tuning import Baseline, tune
    from sparsmith.protocols.pesc import CONTROLS, compare

    loaded = load_recipe(recipe, overrides)
    baseline = Baseline()

    def run(one: Any, label: str) -> Path:
        return tune(one, console=console, label=label, baseline=baseline)

    return compare(loaded, tuple(controls) or tuple(CONTROLS), seeds, Path(loaded.output).absolute(), run)
