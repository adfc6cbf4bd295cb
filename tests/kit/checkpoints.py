"""Small crafted models on disk, and hands that damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open, save_file

import sparsmith as sm
from sparsmith import durable
from sparsmith.exporting import export
from sparsmith.methods.base import LoraSettings
from tests.kit.evalsets import char_tokenizer
from tests.kit.pico import pico_model, randomize_adapters

LORA = LoraSettings(r=4, alpha=8, dropout=0.1)
DELTA, LORA_FILE, IDENTITY = "sparsmith_delta.safetensors", "adapter_model.safetensors", "sparsmith.json"


def save_base(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A pico base as a Hugging Face folder."""
    pico_model(family, **changes).save_pretrained(folder)
    return folder


def train_a_little(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Stand-in for training: every zero-initialised part becomes random, so that no tensor can be lost unseen."""
    randomize_adapters(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def crafted(base: Path, **changes: Any) -> torch.nn.Module:
    """PESC with 4 experts and LoRA on a base folder, as after training."""
    from sparsmith.crafting.base_model import load_base
    from sparsmith.recipe.schema import ModelSettings

    settings = {"num_experts": 4, "top_k": 2, "adapter_dim": 16, "lora": LORA, **changes}
    dense = load_base(ModelSettings(path=str(base)))
    return train_a_little(sm.craft(dense, sm.PescConfig(**settings), inplace=True))


def make_home(home: Path) -> Path:
    """`base`, and what was crafted from it: `delta`, `full` and `export`, each a folder of `home`."""
    model = crafted(save_base(home / "base"))
    sm.save(model, home / "delta")
    sm.save(model, home / "full", full=True)
    export(model, home / "export", tokenizer=char_tokenizer(), proof=False)
    return home


def files_of(folder: Path) -> list[Path]:
    """Every file below the folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def edit_json(file: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file and seal its folder again, as a careful forger would."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data, indent=2))
    durable.seal(file.parent)


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None], *, sealed: bool = True) -> None:
    """Change a safetensors file, its header text kept, and seal its folder again (a base is not sealed)."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)
    if sealed:
        durable.seal(file.parent)


def set_path(data: Any, path: str, value: Any) -> None:
    """`set_path(d, "configs.0.top_k", 1)`."""
    *steps, last = path.split(".")
    for step in steps:
        data = data[int(step)] if isinstance(data, list) else data[step]
    data[int(last) if isinstance(data, list) else last] = value
