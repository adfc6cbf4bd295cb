"""Rows of a classifier: which class a row has, and its text as tokens.

A row is its prompt in the template (by default the prompt alone) with the tokens that the tokenizer itself adds around a text ([CLS] and
[SEP], a bos, or none), and the number of its class. Words of the data that spell a special token are encoded as plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsmith.data.columns import Columns, look_up
from sparsmith.data.messages import NAMES, Messages
from sparsmith.data.options import REFERENCE
from sparsmith.data.rows import RowFault, kind_of
from sparsmith.data.tokens import Template, TokenRow, before_answer, encode_plain, special_words
from sparsmith.recipe.schema import as_label

DEFAULT_TEMPLATE = "{prompt}"
_FORMATS = ("alpaca", "prompt_completion")
_PROBE = "a"


def find_label(
    form: str, names: tuple[str, ...] | None, classes: int, values: Mapping[str, Any], columns: Columns
) -> tuple[int, dict[str, Any], Columns]:
    """(the row's class, the values with the class's name written as the completion, the columns to read them with).

    Args:
        form: the row's format; one with a prompt and a completion.
        names: the source's `labels`; None = the completion is the number itself.
        classes: how many there are.
    """
    if form not in _FORMATS:
        raise RowFault(
            f"a row of the format {form}",
            "a prompt and a completion, which is the class",
            "Name them in the recipe: columns: {prompt: ..., completion: ...}.",
        )
    field = next((ours for ours in ("completion", "output") if ours in columns), None)
    if field:
        value, place = columns.value(field, values), columns.mapping[field]
    else:
        place = next((name for name in NAMES["output"] if name in values), "completion")
        value = look_up(place, values)
    index = _index(value, names, classes, place)
    text = names[index] if names else str(index)
    return index, {**values, REFERENCE: text}, columns.reading_answer_from(REFERENCE)


def _index(value: Any, names: tuple[str, ...] | None, classes: int, place: str) -> int:
    text = as_label(value).strip() if isinstance(value, str | bool | int) else None
    if names is not None and text in names:
        return names.index(text)
    is_number = (
        isinstance(value, int) and not isinstance(value, bool) if names else text is not None and text.isdecimal()
    )
    if is_number and 0 <= int(text or -1) < classes:
        return int(text or -1)
    wanted = "one of " + ", ".join(f"`{name}`" for name in names) if names else f"a number from 0 to {classes - 1}"
    mend = "Mend the row." if names else "Mend the row, or name the classes: `labels: [...]` at the source."
    raise RowFault(f"{kind_of(value)} as the label", wanted, mend, place)


class ClassEncoder:
    """Encodes texts that are classified; the assistant's answer, which is the class, is left out.

    Args:
        classes: how many there are.
    """

    pairs = False

    def __init__(self, tokenizer: Any, template: str | None, classes: int) -> None:
        self.tokenizer, self.classes, self.loss_on = tokenizer, classes, "response"
        self.recipe_template = template or DEFAULT_TEMPLATE
        self.template = Template(self.recipe_template)
        self.special = special_words(tokenizer)
        self.ending = ending_of(tokenizer)
        """What the tokenizer adds behind a text; a row that is cut keeps it."""

    def encode(self, rows: list[Messages]) -> list[TokenRow | RowFault]:
        """Token rows of many texts; one that cannot be encoded comes back as its fault."""
        texts = [self.prompt_text(row) for row in rows]
        plain = [self._spells("".join(message["content"] for message in before_answer(row))) for row in rows]
        found: dict[int, list[int]] = {}
        for flag in (False, True):
            places = [place for place, one in enumerate(plain) if one == flag]
            found |= zip(places, encode_plain(self.tokenizer, [texts[place] for place in places], flag, added=True))
        return [self._row(found[place], plain[place]) for place in range(len(rows))]

    def prompt_text(self, messages: Messages) -> str:
        """The text as the model reads it, without what the tokenizer adds."""
        messages = before_answer(messages)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        return "".join(piece for piece, _ in self.template.render(messages[-1]["content"], system))

    def _spells(self, text: str) -> bool:
        return self.special is not None and self.special.search(text) is not None

    def _row(self, ids: list[int], plain: bool) -> TokenRow | RowFault:
        if plain and self._spells(self.template.literals):
            return RowFault(
                "a text that spells a special token, in a template that has one too",
                "special tokens in one of the two",
                "Mend the row, or the template.",
                "prompt",
            )
        if not ids:
            return RowFault("a text without a token", "a text that the tokenizer knows", "Mend the row.", "prompt")
        return TokenRow(ids, [False] * len(ids))


def ending_of(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer itself puts behind a text."""
    whole, bare = (encode_plain(tokenizer, [_PROBE], added=added)[0] for added in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
    return tuple(whole[start + len(bare) :])
