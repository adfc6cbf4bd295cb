"""Rows of an encoder-decoder: what is read, what is written, and the tensors made of both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import SwitchTransformersConfig

from sparsmith.data import PairCollator, load_data
from sparsmith.data.longest import longest_batch
from sparsmith.data.pairs import PairEncoder, parted
from sparsmith.data.rows import RowFault
from sparsmith.errors import DataError
from sparsmith.recipe.schema import DataSettings, TrainSource
from tests.kit.evalsets import char_tokenizer
from tests.kit.tasks import task_settings, write_tasks

MERGED = [("c", "d")]  # a token that would cross from the prompt into the answer


def ending_tokenizer():
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def talk(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_a_row_is_parted_where_its_answer_begins():
    tokenizer = char_tokenizer(MERGED)
    row = PairEncoder(tokenizer).encode([talk("abc", "de")])[0]
    read, written = parted(row.ids, [i if t else -100 for i, t in zip(row.ids, row.trained)])
    assert tokenizer.decode(read) == "<s>abc"
    assert tokenizer.decode(written) == "de</s>", "an answer is encoded on its own, whatever the prompt ends in"


def test_what_the_tokenizer_puts_behind_a_text_is_read_too():
    encoder = PairEncoder(ending_tokenizer(), "Q: {prompt}")
    row = encoder.encode([talk("ab", "c")])[0]
    assert encoder.tokenizer.decode(row.ids) == "<s>Q: ab</s>c</s>"
    assert row.trained == [False] * 7 + [True, True]
    assert encoder.prompt_ids(talk("ab", "c")) == row.ids[:7]
    assert encoder.prompt_text(talk("ab", "c")) == "Q: ab"


def test_earlier_turns_are_read():
    row = PairEncoder(char_tokenizer()).encode([[*talk("a", "b"), *talk("c", "d")]])[0]
    assert sum(row.trained) == 2
    assert row.ids == char_tokenizer().encode("<s>ab</s>cd</s>", add_special_tokens=False)


def test_rows_with_nothing_to_read_are_faults():
    found = PairEncoder(char_tokenizer()).encode([[{"role": "text", "content": "abc"}], talk(" ", "b"), talk("a", "b")])
    assert [isinstance(one, RowFault) for one in found] == [True, True, False]


def test_the_batch_of_a_hand_written_case():
    config = SwitchTransformersConfig(decoder_start_token_id=9, pad_token_id=0)
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "domain": [1] * 4, "sample_ids": 0},
        {"input_ids": [4, 3], "labels": [-100, 3], "domain": [2] * 2, "sample_ids": 1},
    ]
    batch = PairCollator.of(config)(rows)
    assert batch["input_ids"].tolist() == [[5, 6] + [0] * 6, [4] + [0] * 7]
    assert batch["labels"].tolist() == [[7, 8] + [-100] * 6, [3] + [-100] * 7]
    assert batch["decoder_input_ids"].tolist() == [[9, 7, 8] + [0] * 5, [9, 3] + [0] * 6]
    assert batch["token_mask"].sum(1).tolist() == [2, 1]
    assert torch.equal(batch["attention_mask"], batch["token_mask"].long())
    assert batch["domain"][:, :2].tolist() == [[1, 1], [2, -1]]
    assert batch["sample_ids"].tolist() == [0, 1]


@pytest.mark.parametrize("missing", ["pad_token_id", "decoder_start_token_id"])
def test_a_config_that_does_not_say_how_an_answer_starts(missing):
    config = SwitchTransformersConfig(**{"pad_token_id": 0, "decoder_start_token_id": 0, missing: None})
    with pytest.raises(DataError, match=missing):
        PairCollator.of(config)


def loaded(folder, **more):
    lines = [{"prompt": "a" * (1 + n % 5), "completion": "b" * (1 + n % 3)} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    source = TrainSource(name="rows", domain="d", path="rows.jsonl")
    settings = DataSettings(train=(source,), template="{prompt}", workers=1, cache=str(folder / "cache"))
    return load_data(settings, char_tokenizer(), seed=1, base_dir=folder, rows_needed=12, **more)


def test_the_cache_keeps_the_tasks_apart(tmp_path):
    plain, pairs, again = loaded(tmp_path), loaded(tmp_path, pairs=True), loaded(tmp_path, pairs=True)
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2
    assert torch.equal(pairs.train[0]["input_ids"], again.train[0]["input_ids"])
    assert plain.train.sizes()[0].sum() == pairs.train.sizes()[0].sum(), "this tokenizer adds nothing"
    with pytest.raises(DataError, match="PairCollator"):
        pairs.collator()


def test_the_longest_micro_batch_is_the_widest_on_both_sides(tmp_path):
    rows, collate = loaded(tmp_path, pairs=True).train, PairCollator(0, 0)
    tokens, trained = rows.sizes()
    widest = max(range(12), key=lambda at: int(tokens[at]))
    batch = longest_batch(rows, collate, 1)
    assert int(batch["token_mask"].sum() + (batch["labels"] != -100).sum()) == int(tokens[widest])
    assert isinstance(tokens, np.ndarray) and int(trained.max()) == 4


def test_tasks_of_a_mixture_are_pairs_with_the_same_answers(tmp_path):
    write_tasks(tmp_path)
    settings = task_settings(tmp_path)
    plain, pairs = (
        load_data(settings, char_tokenizer(), seed=1, base_dir=tmp_path, rows_needed=20, pairs=one)
        for one in (False, True)
    )
    for index in range(20):
        one, other = plain.train[index], pairs.train[index]
        assert one["sample_ids"] == other["sample_ids"]
        assert torch.equal(one["input_ids"], other["input_ids"]), "this tokenizer merges nothing and adds nothing"
        assert torch.equal(one["labels"], other["labels"])
    batch = PairCollator(0, 0)([pairs.train[index] for index in range(20)])
    assert int((batch["labels"] != -100).sum()) == int(pairs.train.sizes()[1].sum())
