"""A depth-elastic run without a tuning: a pico base of four blocks with a tokenizer, rows, a recipe, and the crafted model in the run's
folder. Its weights are random, so figures mean nothing; files, ways and ways out do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.kit.checkpoints import save_base
from tests.kit.evalsets import char_tokenizer
from tests.kit.small_run import row_lines

LAYERS, EXITS = 4, [1, 2, 4]
SOFT: dict[str, Any] = {"method": "soft", "exits": EXITS}
PESC: dict[str, Any] = {"method": "pesc", "num_experts": 4, "top_k": 2, "adapter_dim": 8, "lora": {"r": 4}}


def soft_recipe(folder: Path, method: dict[str, Any] = SOFT, **train: Any) -> Path:
    """Base, rows and recipe; returns the recipe's path. The run is `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_base(folder / "base", num_hidden_layers=LAYERS)
    char_tokenizer().save_pretrained(folder / "base")
    for index, name in enumerate(("sums", "words")):
        (folder / f"{name}.jsonl").write_text(row_lines(name, 60, index), encoding="utf-8")
    held = {"heldout": 0.2, "part": "heldout", "limit": 6, "metrics": ["loss", "exact_match"], "max_new_tokens": 8}
    recipe = {
        "model": {"path": "base", "dtype": "float32"},
        "methods": [method],
        "data": {
            "train": [{"name": n, "domain": n, "path": f"{n}.jsonl", "heldout": 0.2, "part": "train"} for n in NAMES],
            "eval": [{"name": f"{n}_held", "domain": n, "path": f"{n}.jsonl", **held} for n in NAMES],
            "template": "{prompt}",
            "max_length": 48,
            "workers": 1,
            "cache": str(folder / "cache"),
        },
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 5.0e-3, "log_every": 2, "threads": 1, **train},
        "proof": {"moved_after": 3},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


NAMES = ("sums", "words")


def crafted_run(folder: Path, method: dict[str, Any] = SOFT) -> Path:
    """The run's folder with its recipe and its model."""
    import sparsmith as sm
    from sparsmith import recipe as recipes
    from sparsmith.app.recipes import load_recipe
    from sparsmith.crafting.base_model import load_base

    recipe = load_recipe(soft_recipe(folder, method))
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    configs: Any = list(recipe.methods)
    sm.save(sm.craft(load_base(recipe.model), configs, inplace=True), run / "model", tokenizer=char_tokenizer())
    return run
