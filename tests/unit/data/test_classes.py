"""Rows of a classifier: labels, tokens, batches, the selection split."""

from __future__ import annotations

import json

import pytest
import torch

from sparsmith.data import ClassCollator, load_data
from sparsmith.data.classes import ClassEncoder
from sparsmith.errors import DataError
from sparsmith.recipe.schema import EvalSource, SelectSettings
from tests.kit.classifying import class_tokenizer
from tests.kit.evalsets import char_tokenizer
from tests.kit.rowfiles import settings, source, write_jsonl

NAMES = ("no", "yes")
LABELLED = {"labels": NAMES}


def rows(count: int = 40, names=NAMES) -> list[dict]:
    return [{"prompt": f"text {i} {'x' * (i % 5)}", "completion": names[i % 2]} for i in range(count)]


def loaded(folder, given, *, classes=2, seed=1, tokenizer=None, data=None, held=(), **changes):
    write_jsonl(folder / "r.jsonl", given)
    made = settings(folder, [source("r.jsonl", **{**LABELLED, **changes})], held, packing=False, **(data or {}))
    return lambda **more: load_data(
        made, tokenizer or char_tokenizer(), seed=seed, base_dir=folder, classes=classes, **more
    )


def labels_of(data) -> list[int]:
    return [data.train[i]["labels"] for i in range(len(data.train))]


@pytest.mark.parametrize(
    "changes, answers",
    [
        ({}, ["no", "yes"]),
        ({"labels": (False, True)}, [False, True]),
        ({"labels": (False, True)}, ["false", "true"]),
        ({}, [0, 1]),
        ({"labels": None}, [0, 1]),
        ({"labels": None}, ["0", "1"]),
        ({"columns": {"prompt": "prompt", "completion": "completion"}}, [" no ", "yes"]),
    ],
)
def test_a_label_is_a_name_or_a_number(tmp_path, changes, answers):
    given = [{"prompt": f"t {i}", "completion": answers[i % 2]} for i in range(6)]
    data = loaded(tmp_path, given, **changes)(rows_needed=6)
    by_text = {data.place(data.train[i]["sample_ids"]): data.train[i]["labels"] for i in range(6)}
    assert [by_text[f"r.jsonl:{line}"] for line in range(1, 7)] == [0, 1] * 3
    assert data.counts["train"]["rows"]["kept"] == 6 and data.counts["train"]["rows"]["all_masked"] == 0


@pytest.mark.parametrize(
    "changes, answer, words",
    [
        ({}, "maybe", r"r\.jsonl:3:completion: found the text 'maybe' as the label; expected one of `no`, `yes`"),
        ({}, 2, "found the number 2 as the label"),
        ({}, "1", "found the text '1' as the label"),
        ({}, True, "found the boolean true as the label"),
        ({}, None, "found null as the label"),
        ({}, 1.0, r"found the number 1\.0 as the label"),
        ({"labels": None}, "yes", "expected a number from 0 to 1. Mend the row, or name the classes"),
        ({"labels": None}, -1, "found the number -1 as the label"),
        ({"labels": None}, True, "found the boolean true as the label"),
    ],
)
def test_an_unknown_label_is_a_bad_row_with_its_place(tmp_path, changes, answer, words):
    good = [0, 1] if "labels" in changes else ["no", "yes"]
    given = [{"prompt": "a", "completion": one} for one in (*good, answer)]
    with pytest.raises(DataError, match=words):
        loaded(tmp_path, given, **changes)(rows_needed=3)
    data = loaded(tmp_path, given, on_bad_row="skip", **changes)(rows_needed=2)
    assert data.counts["train"]["rows"]["rejected"] == 1 and len(data.rejects["rows"]) == 1


def test_alpaca_rows_have_a_label_too_and_conversations_none(tmp_path):
    given = [{"instruction": f"t {i}", "answer": NAMES[i % 2]} for i in range(4)]
    assert sorted(labels_of(loaded(tmp_path, given)(rows_needed=4))) == [0, 0, 1, 1]
    talk = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}]}]
    with pytest.raises(DataError, match="a row of the format messages; expected a prompt and a completion"):
        loaded(tmp_path, talk)(rows_needed=1)


def test_tokens_are_the_text_and_what_the_tokenizer_adds(tmp_path):
    decoder, encoder = char_tokenizer(), class_tokenizer("bert")
    for tokenizer, ends in ((decoder, ((), ())), (encoder, ((1,), (2,)))):
        data = loaded(tmp_path, rows(2), tokenizer=tokenizer, data={"cache": str(tmp_path / str(ends))})(rows_needed=2)
        item = data.train[0]
        bare = tokenizer(f"text {item['sample_ids']} {'x' * item['sample_ids']}", add_special_tokens=False)["input_ids"]
        assert item["input_ids"].tolist() == [*ends[0], *bare, *ends[1]]
    assert ClassEncoder(encoder, None, 2).ending == (2,) and ClassEncoder(decoder, None, 2).ending == ()


def test_a_row_that_is_cut_keeps_what_the_tokenizer_adds_behind_it(tmp_path):
    given = [{"prompt": "a" * 40, "completion": "no"}]
    held = (EvalSource(name="e", domain="d", path="r.jsonl", labels=NAMES),)
    data = loaded(
        tmp_path, given, tokenizer=class_tokenizer("bert"), held=held, data={"max_length": 16, "over_long": "truncate"}
    )(rows_needed=1)
    for ids in (data.train[0]["input_ids"].tolist(), data.eval["e"].rows[0].input_ids):
        assert len(ids) == 16 and ids[0] == 1 and ids[-1] == 2
    assert data.counts["train"]["rows"]["truncated"] == 1


def test_words_that_spell_a_special_token_are_text(tmp_path):
    data = loaded(tmp_path, [{"prompt": "a </s> b", "completion": "no"}], tokenizer=class_tokenizer("bert"))(
        rows_needed=1
    )
    assert data.train[0]["input_ids"].tolist().count(2) == 1


def test_eval_rows_hold_text_and_class(tmp_path):
    held = (EvalSource(name="e", domain="d", path="r.jsonl", labels=NAMES, limit=5),)
    data = loaded(tmp_path, rows(), held=held, data={"template": "Q: {prompt}"})(rows_needed=4)
    row = data.eval["e"].rows[0]
    assert row.prompt.startswith("Q: text ") and row.completion == NAMES[row.label] and row.labels == []
    assert data.eval["e"].batch_rows()[0]["labels"] == row.label and len(data.eval["e"]) == 5


def test_a_batch_is_padded_and_has_a_class_per_row(tmp_path):
    data = loaded(tmp_path, rows())(rows_needed=8)
    items = [data.train[i] for i in range(4)]
    batch = data.collator()(items)
    assert batch["labels"].tolist() == [item["labels"] for item in items] and batch["labels"].dtype == torch.int64
    for number, item in enumerate(items):
        n = len(item["input_ids"])
        assert batch["input_ids"][number, :n].equal(item["input_ids"]) and batch["input_ids"][number, n:].eq(0).all()
        assert batch["attention_mask"][number].sum() == batch["token_mask"][number].sum() == n
        assert batch["domain"][number, :n].eq(0).all() and batch["domain"][number, n:].eq(-1).all()
    assert batch["sample_ids"].tolist() == [item["sample_ids"] for item in items]
    assert ClassCollator(0, 12).shape_of([9, 11]) == (2, 12) and ClassCollator(0).shape_of([9, 11]) == (2, 16)


def test_the_cache_gives_the_same_rows(tmp_path):
    first, again = (loaded(tmp_path, rows())(rows_needed=20) for _ in range(2))
    assert labels_of(first) == labels_of(again) and list((tmp_path / "cache").glob("*.npz"))


def picked(folder, seed: int, select: SelectSettings, held=()) -> tuple:
    data = loaded(folder, rows(100), seed=seed, held=held)(rows_needed=200, select=select)
    chosen = {row.place for row in data.selection["rows"].rows}
    trained = {data.place(data.train[i]["sample_ids"]) for i in range(200)}
    return chosen, trained, data


def test_the_selection_is_cut_from_train_by_the_seed(tmp_path):
    held = (EvalSource(name="e", domain="d", path="held.jsonl", labels=NAMES),)
    write_jsonl(tmp_path / "held.jsonl", rows(10))
    select = SelectSettings(share=0.2, every=5)
    chosen, trained, data = picked(tmp_path, 1, select, held)
    assert len(chosen) == 20 and len(trained) == 80 and not chosen & trained
    assert all(place.startswith("r.jsonl") for place in chosen)  # none of the rows that are reported on
    assert data.counts["train"]["rows"]["selection"] == 20 and data.counts["train"]["rows"]["kept"] == 80
    line = {f"r.jsonl:{number}": number - 1 for number in range(1, 101)}
    assert all(row.label == line[row.place] % 2 for row in data.selection["rows"].rows)
    assert picked(tmp_path, 1, select, held)[0] == chosen and picked(tmp_path, 2, select, held)[0] != chosen
    assert len(picked(tmp_path, 1, SelectSettings(share=0.5, max_rows=7, every=5))[0]) == 7


def test_too_few_rows_to_select_by(tmp_path):
    with pytest.raises(DataError, match=r"train\.select: found no row"):
        loaded(tmp_path, rows(5))(rows_needed=5, select=SelectSettings(share=0.1, every=2))


def test_a_limit_is_drawn_by_the_seed(tmp_path):
    found = [
        {data.place(data.train[i]["sample_ids"]) for i in range(10)}
        for data in (loaded(tmp_path, rows(100), seed=seed, limit=10)(rows_needed=10) for seed in (1, 1, 2))
    ]
    assert found[0] == found[1] != found[2]


def test_rows_are_shown_with_their_class(tmp_path):
    from sparsmith.data.view import view_of

    view = view_of(loaded(tmp_path, rows())(rows_needed=4), 2)
    assert ": class " in view.as_text() and json.dumps(view.as_dict())
