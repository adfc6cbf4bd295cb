"""Rows by a chat template: the same spans whether the template marks them or not, and an error where they cannot be told."""

from __future__ import annotations

import pytest

from sparsmith.data.chat import ChatEncoder, make_encoder
from sparsmith.data.rows import RowFault
from sparsmith.data.tokens import TemplateEncoder, TokenRow
from sparsmith.errors import DataError
from tests.kit.rowfiles import CHATML, MARKED, chat_tokenizer
from tests.unit.data.test_tokens import turns

TALK = turns("hi", "an", "why", "so\nwe", system="be")
SHIFTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ 'last ' if loop.last else '' }}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSING = "{{ raise_exception('no system\nmessages here') }}"


def spans(tokenizer, row) -> list[str]:
    """The trained stretches as text."""
    assert isinstance(row, TokenRow), row
    result, open_span = [], False
    for token, trained in zip(row.ids, row.trained):
        if trained:
            result = [*result, ""] if not open_span else result
            result[-1] += tokenizer.decode([token])
        open_span = trained
    return result


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_answer_is_trained_up_to_its_end_of_turn(template):
    tokenizer = chat_tokenizer(template)
    encoder = ChatEncoder(tokenizer)
    assert (encoder.marked is not None) == (template == MARKED)
    row = encoder.encode([TALK])[0]
    assert spans(tokenizer, row) == ["an<|im_end|>", "so\nwe<|im_end|>"]
    assert row.ids.count(tokenizer.bos_token_id) == 1 and row.ids[0] == tokenizer.bos_token_id
    prompt = encoder.prompt_ids(TALK)
    assert row.ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n") and not encoder.prompt_text(TALK).startswith(
        "<s>"
    )


def test_marked_and_unmarked_templates_agree():
    rows = [ChatEncoder(chat_tokenizer(template)).encode([TALK])[0] for template in (CHATML, MARKED)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_words_that_spell_control_tokens_stay_text(template):
    tokenizer = chat_tokenizer(template)
    row = ChatEncoder(tokenizer).encode([turns("a <|im_end|><s>", "b</s> <|im_start|> c")])[0]
    assert spans(tokenizer, row)[0].endswith("c<|im_end|>") and len(spans(tokenizer, row)) == 1
    assert row.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert tokenizer.eos_token_id not in row.ids and row.ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_rewrites_turns_is_refused():
    encoder = ChatEncoder(chat_tokenizer(SHIFTING))
    found = encoder.encode([TALK])[0]
    assert (
        isinstance(found, RowFault)
        and "writes earlier turns anew" in found.found
        and "generation" in found.mend + found.expected
    )


def test_a_row_that_the_template_refuses_is_a_fault_of_the_row():
    good, bad = ChatEncoder(chat_tokenizer(CHATML)), ChatEncoder(chat_tokenizer(REFUSING))
    assert isinstance(good.encode([TALK])[0], TokenRow)
    found = bad.encode([TALK])[0]
    assert isinstance(found, RowFault) and "\n" not in str(found.at("f", 1))


def test_a_template_without_an_end_of_turn_gets_eos():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = ChatEncoder(tokenizer).encode([turns("a", "b")])[0]
    assert spans(tokenizer, row) == ["b\n</s>"]


def test_loss_on_all_and_plain_text():
    tokenizer = chat_tokenizer()
    row = ChatEncoder(tokenizer, "all").encode([TALK])[0]
    assert row.trained == [False] + [True] * (len(row.ids) - 1)
    row = ChatEncoder(tokenizer).encode([[{"role": "text", "content": "once"}]])[0]
    assert spans(tokenizer, row) == ["once</s>"]


def test_known_templates_get_their_training_form():
    from trl import chat_template_utils

    tokenizer = chat_tokenizer(chat_template_utils.qwen3_chat_template)
    encoder = ChatEncoder(tokenizer)
    assert encoder.marked == chat_template_utils.qwen3_training_chat_template
    found = spans(tokenizer, encoder.encode([turns("a", "b", "c", "d")])[0])
    assert len(found) == 2 and found[0].endswith("b<|im_end|>") and found[1].endswith("d<|im_end|>")


def test_the_encoder_follows_the_recipe():
    assert isinstance(make_encoder(chat_tokenizer(), None, "response"), ChatEncoder)
    assert isinstance(make_encoder(chat_tokenizer(None), None, "response"), TemplateEncoder)
    assert isinstance(make_encoder(chat_tokenizer(), "{prompt}", "response"), TemplateEncoder)
    with pytest.raises(DataError, match="no chat template"):
        make_encoder(chat_tokenizer(None), "chat", "response")
