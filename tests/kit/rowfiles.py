"""Files of rows, settings over them, and a chat tokenizer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from sparsmith.recipe.schema import DataSettings, EvalSource, TrainSource
from tests.kit.evalsets import char_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """A character tokenizer with the turn marks of ChatML."""
    tokenizer = char_tokenizer([("a", "n"), ("\n", "w")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def rows_of(count: int, word: str = "row") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {i}?", "completion": f"answer {i}" + "!" * (i % 7)} for i in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def source(path: str | Path, **changes: Any) -> TrainSource:
    return TrainSource(**{"name": "rows", "domain": "d", "path": str(path), **changes})


def settings(
    folder: Path, train: list[TrainSource], held_out: tuple[EvalSource, ...] = (), **changes: Any
) -> DataSettings:
    return DataSettings(
        **{"train": tuple(train), "eval": held_out, "cache": str(folder / "cache"), "max_length": 64, **changes}
    )
