"""Held-out rows: prompts, references, and options in every writing."""

from __future__ import annotations

import pytest

from sparsmith.data.chat import make_encoder
from sparsmith.data.collate import Collator
from sparsmith.data.evalsets import load_eval
from sparsmith.errors import DataError
from sparsmith.recipe.schema import EvalSource
from tests.kit.evalsets import char_tokenizer
from tests.kit.rowfiles import settings, source, write_jsonl

TOKENIZER = char_tokenizer()


def load(folder, rows, **more):
    write_jsonl(folder / "e.jsonl", rows)
    made = settings(folder, [source("e.jsonl")], template="Q {prompt} A ", max_length=200)
    wanted = EvalSource(**{"name": "e", "domain": "d", "path": "e.jsonl", **more})
    return load_eval(wanted, 2, made, make_encoder(TOKENIZER, made.template, "response"), folder)


def rank(folder, rows, options, **more):
    return load(folder, rows, metrics=("rank",), options=options, **more)


def test_a_row_has_its_prompt_and_reference(tmp_path):
    found = load(tmp_path, [{"prompt": "why", "completion": "so"}])
    row = found.rows[0]
    assert (row.prompt, row.completion, row.place) == ("Q why A ", "so", "e.jsonl:1")
    assert TOKENIZER.decode(row.prompt_ids) == "<s>Q why A "
    assert row.input_ids[: len(row.prompt_ids)] == row.prompt_ids
    assert TOKENIZER.decode([token for token in row.labels if token >= 0]) == "so</s>"
    batch = Collator(0)(found.batch_rows())
    assert batch["domain"][batch["token_mask"]].unique().tolist() == [2] and batch["sample_ids"].tolist() == [0]


@pytest.mark.parametrize(
    ("row", "options", "expected", "index"),
    [
        ({"prompt": "q", "completion": "no"}, ("yes", "no"), ("yes", "no"), 1),
        ({"prompt": "q", "completion": "b", "choices": ["a", "b"]}, "choices", ("a", "b"), 1),
        ({"prompt": "q", "completion": 1, "choices": ["a", "b"]}, "choices", ("a", "b"), 1),
        ({"prompt": "q", "completion": True}, ("false", "true"), ("false", "true"), 1),
        ({"prompt": "q", "completion": "C", "choices": ["A)1", "B)2", "C)3"]}, "choices", ("A", "B", "C"), 2),
        ({"prompt": "Is it?\nOptions:\n- yes\n- no", "completion": "yes"}, "prompt", ("yes", "no"), 0),
        ({"prompt": "Is it?\nOptions:\n(A) 3\n(B) 4", "completion": "(B)"}, "prompt", ("(A)", "(B)"), 1),
        (
            {"instruction": "Is it?\n\nAnswer format: true/false", "answer": "false"},
            "instruction",
            ("true", "false"),
            1,
        ),
    ],
)
def test_options(tmp_path, row, options, expected, index):
    found = rank(tmp_path, [row], options).rows[0]
    assert (found.options, found.answer_index, found.completion) == (expected, index, expected[index])
    for option in found.option_rows:
        assert TOKENIZER.decode([token for token in option.labels if token >= 0]) == option.text
        assert option.input_ids[: len(found.prompt_ids)] == found.prompt_ids


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"prompt": "q", "completion": "maybe"}, ("yes", "no"), "none of 2 options"),
        ({"prompt": "q", "completion": 5, "c": ["a", "b"]}, "c", "none of 2 options"),
        ({"prompt": "q", "completion": "a", "c": ["a"]}, "c", "1 options"),
        ({"prompt": "q", "completion": "a", "c": ["a", 3]}, "c", "an option that is not a text"),
        ({"prompt": "q", "completion": "a", "c": 3}, "c", "the number 3"),
        ({"prompt": "q", "completion": "a"}, "prompt", "a text without options"),
        ({"prompt": "q", "completion": "a"}, "chioces", "no column `chioces`"),
    ],
)
def test_options_that_cannot_be_are_bad_rows(tmp_path, row, options, words):
    with pytest.raises(DataError, match=words) as caught:
        rank(tmp_path, [row], options)
    assert caught.value.where.startswith("e.jsonl:1")


def test_the_same_rows_whatever_the_seed_and_over_long_counted(tmp_path):
    rows = [{"prompt": "p" * n, "completion": "c"} for n in range(1, 300, 10)]
    found = load(tmp_path, rows, limit=20)
    assert found.counts["kept"] + found.counts["over_long"] == 20 and found.counts["limited"] == 10
    assert [row.place for row in found.rows] == [row.place for row in load(tmp_path, rows, limit=20).rows]


def test_a_multi_turn_row_is_asked_for_its_last_answer(tmp_path):
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    row = load(tmp_path, [{"messages": talk}]).rows[0]
    assert (row.prompt, row.completion) == ("Q a A b</s>Q c A ", "d")
    assert row.input_ids[: len(row.prompt_ids)] == row.prompt_ids
    assert TOKENIZER.decode(row.prompt_ids) == "<s>" + row.prompt


def test_plain_text_has_no_prompt(tmp_path):
    row = load(tmp_path, [{"text": "once"}]).rows[0]
    assert (row.prompt, row.prompt_ids, row.completion) == ("", [], "once")
