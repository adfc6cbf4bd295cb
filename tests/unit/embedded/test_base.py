"""The base that ships: found without torch, opened by stock classes, and able to say how instructions look."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsmith import embedded
from sparsmith.errors import EnvironmentFault

MAX_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.base_path())


def test_found_without_torch():
    code = (
        "import sys; from sparsmith.embedded import base_path, tasks; print(base_path().name, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["base", "False"]


def test_a_missing_base_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded.resources, "files", lambda package: tmp_path)
    with pytest.raises(EnvironmentFault, match=r"model\.safetensors"):
        embedded.base_path()


def test_small_enough_to_ship():
    assert sum(file.stat().st_size for file in embedded.base_path().iterdir()) < MAX_BYTES


def test_opens_as_a_stock_llama_with_grouped_queries():
    model = AutoModelForCausalLM.from_pretrained(embedded.base_path(), dtype="auto")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_begins_once_with_bos(tokenizer):
    ids = tokenizer("Two words")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_digits_stand_alone(tokenizer):
    assert [token for token in tokenizer.tokenize("a 1234 b") if any(sign.isdigit() for sign in token)] == list("1234")


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", " spaced  out ", "naïve – 😀\t\x00", "### Human:\n"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_chat_template_is_the_instruction_template(tokenizer):
    turns = [{"role": "user", "content": "1 + 1 ="}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>### Human:\n1 + 1 =\n### Assistant:\n"
    answered = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "2"}], tokenize=False)
    assert answered.startswith(rendered + "2</s>")


def test_prefers_english_to_its_shuffle(tokenizer):
    """Trained, and stored whole: text in order is far likelier than the same words out of order."""
    model = AutoModelForCausalLM.from_pretrained(embedded.base_path(), dtype=torch.float32).eval()

    def loss(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            return model(input_ids=ids, labels=ids).loss.item()

    assert loss("How many apples did she buy?") + 1 < loss("apples many she How did? buy")
