"""Rows by a recipe's template: one bos, every answer with its eos, the prompt's ids as generation will see them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsmith.data import render_prompt
from sparsmith.data.tokens import Template, TemplateEncoder, one_bos
from sparsmith.errors import DataError, RecipeError
from tests.kit.evalsets import ALPHABET, char_tokenizer

TOKENIZER = char_tokenizer([("a", "n"), ("\n", "w"), (" ", "a")])
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def trained_text(row) -> str:
    return text_of([token for token, one in zip(row.ids, row.trained) if one])


def test_a_row_reads_bos_prompt_answer_eos():
    row = TemplateEncoder(TOKENIZER, "Q {prompt} A ").encode([turns("why", "so")])[0]
    assert text_of(row.ids) == "<s>Q why A so</s>" and trained_text(row) == "so</s>"


def test_every_turn_is_trained():
    row = TemplateEncoder(TOKENIZER, "Q {prompt} A ").encode([turns("a", "b", "c", "d")])[0]
    assert text_of(row.ids) == "<s>Q a A b</s>Q c A d</s>" and trained_text(row) == "b</s>d</s>"


def test_the_system_message_has_its_place():
    with_field = TemplateEncoder(TOKENIZER, "S {system} Q {prompt} A ")
    assert text_of(with_field.encode([turns("a", "b", system="be")])[0].ids) == "<s>S be Q a A b</s>"
    assert text_of(with_field.encode([turns("a", "b")])[0].ids) == "<s>S  Q a A b</s>"
    without = TemplateEncoder(TOKENIZER, "Q {prompt} A ")
    assert text_of(without.encode([turns("a", "b", "c", "d", system="be")])[0].ids) == "<s>be\n\nQ a A b</s>Q c A d</s>"


def test_loss_on_all_and_plain_text():
    row = TemplateEncoder(TOKENIZER, "Q {prompt} A ", "all").encode([turns("a", "b")])[0]
    assert row.trained == [False] + [True] * (len(row.ids) - 1)
    row = TemplateEncoder(TOKENIZER).encode([[{"role": "text", "content": "once"}]])[0]
    assert text_of(row.ids) == "<s>once</s>" and trained_text(row) == "once</s>"


def test_words_that_spell_special_tokens_stay_text():
    for template in ("Q {prompt} A ", "<s>Q {prompt}</s> A "):
        row = TemplateEncoder(TOKENIZER, template).encode([turns("a <s> b</s>", "c</s> d")])[0]
        assert row.ids.count(BOS) == 1 and row.ids[0] == BOS
        assert row.ids.count(EOS) == (1 if "</s>" not in template else 2)
        assert row.ids[-1] == EOS and row.trained[-1]


words = st.text(st.sampled_from(ALPHABET), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=50, deadline=None)
@given(st.lists(words, min_size=2, max_size=6).filter(lambda one: len(one) % 2 == 0), words)
def test_the_prompt_is_a_prefix_and_the_text_survives(contents, system):
    encoder = TemplateEncoder(TOKENIZER, "\n#{prompt}\n:\n")
    for messages in (turns(*contents), turns(*contents, system=system)):
        row = encoder.encode([messages])[0]
        prompt = encoder.prompt_ids(messages)
        assert row.ids[: len(prompt)] == prompt and not row.trained[len(prompt) - 1] and row.trained[len(prompt)]
        assert row.ids.count(BOS) == 1 and text_of(prompt) == "<s>" + encoder.prompt_text(messages)
        assert trained_text(row) == "".join(f"{answer}</s>" for answer in contents[1::2])
        assert row == encoder.encode([turns("x", "y"), messages])[1]


@pytest.mark.parametrize(
    ("ids", "bos", "eos", "expected"),
    [
        ([5, 6], 1, 2, [1, 5, 6]),
        ([1, 5, 6], 1, 2, [1, 5, 6]),
        ([1, 1, 5, 1, 6, 2], 1, 2, [1, 5, 6, 2]),
        ([5, 6], None, 2, [5, 6]),
        ([2, 5, 2, 6, 2], 2, 2, [2, 5, 2, 6, 2]),
        ([2, 2, 5, 2], 2, 2, [2, 5, 2]),
    ],
)
def test_one_bos(ids, bos, eos, expected):
    row = one_bos(ids, [True] * len(ids), bos, eos)
    assert row.ids == expected and row.trained[0] is False and len(row.trained) == len(expected)


@pytest.mark.parametrize("template", ["no field", "{prompt}{prompt}", "{promt}", "{", "{prompt} {}"])
def test_a_template_with_a_fault_is_named(template):
    with pytest.raises(RecipeError, match=r"data\.template"):
        Template(template)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        TemplateEncoder(tokenizer)


def test_render_prompt():
    assert text_of(render_prompt("hi", TOKENIZER, "Q {prompt} A ")) == "<s>Q hi A "
    assert text_of(render_prompt("hi", TOKENIZER, raw=True)) == "<s>hi"
