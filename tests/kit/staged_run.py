"""A run of two stages small enough to be killed many times: a LoRA alone, or exits, settled; then experts on what that has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.kit.checkpoints import save_base
from tests.kit.evalsets import char_tokenizer
from tests.kit.small_run import METHODS, make_recipe, row_lines

DENSE = {"method": "pesc", "control": "dense_lora", "lora": {"r": 4, "dropout": 0.1}}
EXPERTS = METHODS["pesc"]
STEPS = (6, 7)


def staged_recipe(folder: Path, first: dict[str, Any] = DENSE, **base: Any) -> Path:
    """Write base, rows and a recipe of two stages into `folder`, and return the recipe's path; `base` changes the base's config."""
    if base and not (folder / "base").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        save_base(folder / "base", **base)
        char_tokenizer().save_pretrained(folder / "base")
        for index, name in enumerate(("sums", "words")):
            (folder / f"{name}.jsonl").write_text(row_lines(name, 80, seed=index), encoding="utf-8")
    path = make_recipe(folder, "pesc", save_every=3, eval_every=None, learning_rate=5.0e-3)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    del recipe["methods"], recipe["train"]["steps"]
    recipe["stages"] = [
        {"name": "first", "methods": [first], "train": {"steps": STEPS[0]}},
        {"methods": [EXPERTS], "train": {"steps": STEPS[1], "seed": 7}},
    ]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
