"""A method that tunes classifiers, written in the test folder alone (LoRA on the blocks, the class head whole), and what its runs need:
pico bases of decoders and encoders on disk, and rows whose class can be learned.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

from sparsmith import anatomy
from sparsmith.methods.base import LoraSettings, Method, MethodConfig, MethodPlan, ModuleChange
from tests.kit.evalsets import char_tokenizer
from tests.kit.pico import FAMILIES, FFN, HEADS, HIDDEN, LAYERS, VOCAB

_ENCODER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 96,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
CLASSIFIED: dict[str, dict[str, Any]] = {**FAMILIES, "bert": _ENCODER, "roberta": {**_ENCODER, "type_vocab_size": 1}}
FEW = ("llama", "qwen2", "gpt2", "bert", "roberta")


class HeadConfig(MethodConfig):
    method: Literal["head"] = "head"
    lora: LoraSettings = LoraSettings(r=4, alpha=8, dropout=0.1)


class HeadMethod(Method):
    name = "head"
    title = "LoRA and class head"
    paper = "https://example.org/head"
    config_class = HeadConfig
    tasks = ("seq_cls",)

    def plan(self, config: Any, anatomy: Any, shape: Any) -> MethodPlan:
        change = ModuleChange(anatomy.classifier, "trained whole", 1)
        return MethodPlan(changes=(change,), added={}, trained={"classifier": shape.classifier_params})

    def craft(self, model: Any, config: Any, context: Any) -> Any:
        return model

    def roles(self, model: Any, config: Any) -> dict[str, list[tuple[str, nn.Parameter]]]:
        return {"classifier": anatomy.classifier_tensors(model)}

    def wanted_roles(self, config: Any) -> tuple[str, ...]:
        return ("classifier",)

    def lora(self, config: Any, shape: Any = None) -> LoraSettings:
        return config.lora


HEAD = HeadMethod()


def classifier_config(family: str, classes: int = 3, **changes: Any) -> Any:
    """A pico config of a family."""
    return AutoConfig.for_model(family, **{**CLASSIFIED[family], **changes}, num_labels=classes)


def class_tokenizer(family: str) -> Any:
    """The character tokenizer; of an encoder it puts <s> and </s> around a text, as such tokenizers do."""
    tokenizer = char_tokenizer()
    if family in ("bert", "roberta"):
        from tokenizers.processors import TemplateProcessing

        marks = [("<s>", 1), ("</s>", 2)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return tokenizer


def save_pretrained_base(folder: Path, family: str, **changes: Any) -> Path:
    """A checkpoint that knows of no classes: of a causal LM, of BERT's pre-training, of RoBERTa's masked LM; with a tokenizer."""
    opener: Any = {"bert": AutoModelForPreTraining, "roberta": AutoModelForMaskedLM}.get(family, AutoModelForCausalLM)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**CLASSIFIED[family], **changes})
    opener.from_config(config).save_pretrained(folder)
    torch.set_rng_state(state)
    class_tokenizer(family).save_pretrained(folder)
    return folder


def class_lines(count: int, seed: int, names: tuple[Any, Any] = ("no", "yes")) -> str:
    """Rows whose class is whether the text begins with an `a`, its words being drawn."""
    stream = random.Random(seed)
    lines = []
    for _ in range(count):
        index = stream.randrange(2)
        text = "zkqw"[stream.randrange(4)] if not index else "a"
        text += "".join(stream.choice("bcdefg ") for _ in range(stream.randrange(3, 24)))
        lines.append(json.dumps({"prompt": text, "completion": names[index]}))
    return "\n".join(lines) + "\n"


def make_class_recipe(folder: Path, family: str = "llama", model: dict[str, Any] | None = None, **train: Any) -> Path:
    """Base, rows of two domains that name their classes differently, and a recipe; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        save_pretrained_base(folder / "base", family)
    names = {"words": ("no", "yes"), "other": ("false", "true")}
    for index, (name, labels) in enumerate(names.items()):
        (folder / f"{name}.jsonl").write_text(class_lines(120, index, labels), encoding="utf-8")
        (folder / f"{name}_held.jsonl").write_text(class_lines(40, 10 + index, labels), encoding="utf-8")

    def source(name: str, file: str) -> dict[str, Any]:
        return {"name": file, "domain": name, "path": f"{file}.jsonl", "labels": list(names[name])}

    recipe = {
        "model": {"path": "base", "task": "seq_cls", "num_labels": 2, **(model or {})},
        "methods": [{"method": "head", "lora": {"r": 4, "dropout": 0.1}}],
        "data": {
            "train": [source(name, name) for name in names],
            "eval": [source(name, f"{name}_held") for name in names],
            "max_length": 64,
            "workers": 1,
            "cache": str(folder / "cache"),
        },
        "train": {
            "steps": 30,
            "batch_size": 16,
            "micro_batch_size": 8,
            "learning_rate": 1e-2,
            "log_every": 5,
            "threads": 1,
            **train,
        },
        "proof": {"moved_after": 3},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
