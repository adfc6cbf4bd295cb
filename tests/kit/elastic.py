"""A depth-elastic run small enough for the fast tests: a pico base of four blocks, two sets of rows, a handful of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.kit.checkpoints import save_base
from tests.kit.evalsets import char_tokenizer
from tests.kit.small_run import make_recipe, row_lines

LAYERS, EXITS, STEPS = 4, [1, 2, 4], 4


def elastic_recipe(folder: Path, *, eval_rows: bool = True, train: dict[str, Any] | None = None, **method: Any) -> Path:
    """Write base, rows and recipe into `folder` and return the recipe's path. `method` goes on top of the method's settings."""
    base = folder / "base"
    if not base.is_dir():
        save_base(base, num_hidden_layers=LAYERS)
        char_tokenizer().save_pretrained(base)
        for name in ("sums", "words"):
            (folder / f"{name}.jsonl").write_text(row_lines(name, 80, seed=len(name)), encoding="utf-8")
    path = make_recipe(folder, "pesc", **{"steps": STEPS, "eval_every": None, "save_every": None, **(train or {})})
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["methods"] = [{"method": "soft", "exits": EXITS, **method}]
    if not eval_rows:
        recipe["data"]["eval"] = []
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
