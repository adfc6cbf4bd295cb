"""Messages -> token ids and the tokens that are trained.

With a recipe template a row reads: bos, then for each turn the rendered prompt, the answer, eos. Trained are the answers and their
eos; with `loss_on: all` everything but the bos; a plain text whole. A system message fills `{system}` of the first turn, or
stands before it with a blank line where the template has no such field.

The prompt's ids are those that the tokenizer gives to the prompt alone, so that training and generation meet at the same
boundary: an answer is encoded together with the end of the prompt before it, and on its own where a token would cross over. Words in the
data that spell a special token (`</s>` in a web page) are encoded as plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from string import Formatter
from typing import Any

from sparsmith.data.messages import Messages
from sparsmith.errors import DataError, RecipeError, nearest

DEFAULT_TEMPLATE = "### Human:\n{prompt}\n### Assistant:\n"
CONTEXT = 32
"""Characters before a segment that are encoded with it, so that its first token is the one of running text."""


@dataclass(frozen=True)
class TokenRow:
    """One row of tokens."""

    ids: list[int]
    trained: list[bool]
    """Which tokens are predicted. Never the first."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a row: text to encode, or ids that are given."""

    text: str = ""
    trained: bool = False
    plain: bool = False
    """Special tokens spelled in the text are plain text."""
    ids: tuple[int, ...] | None = None


class Template:
    """The recipe's prompt text, parsed."""

    def __init__(self, text: str) -> None:
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as fault:
            raise RecipeError(
                "data.template", f"a template with a fault ({fault})", "`{prompt}`, braces doubled", "Mend it."
            ) from None
        self.parts = [(literal, name) for literal, name, _, _ in parsed]
        fields = [name for _, name in self.parts if name is not None]
        for name in fields:
            if name not in ("prompt", "system"):
                raise RecipeError(
                    "data.template",
                    f"the field `{{{name}}}`",
                    "`{prompt}` and `{system}`",
                    nearest(name, ("prompt", "system")),
                )
        if fields.count("prompt") != 1 or fields.count("system") > 1:
            raise RecipeError(
                "data.template", f"{fields.count('prompt')} x {{prompt}}", "{prompt} once", "Mend the template."
            )
        self.has_system = "system" in fields
        self.literals = "".join(literal for literal, _ in self.parts)

    def render(self, prompt: str, system: str) -> list[tuple[str, bool]]:
        """(text, comes from the data) pieces of one turn."""
        head = [(f"{system}\n\n", True)] if system and not self.has_system else []
        fields = {"prompt": prompt, "system": system}
        return head + [
            piece
            for text, name in self.parts
            for piece in ((text, False), (fields[name] if name else "", True))
            if piece[0]
        ]


def cut_ids(ids: list[int], max_length: int, ending: tuple[int, ...] = ()) -> list[int]:
    """The first `max_length` ids; where some go, `ending` stays at the end."""
    return ids if len(ids) <= max_length else [*ids[: max_length - len(ending)], *ending]


class TemplateEncoder:
    """Encodes rows by the recipe's template."""

    classes: int | None = None
    """Of a classifier's rows how many there are."""
    pairs: bool = False
    """True where a row is read by an encoder up to its answer."""
    ending: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any, template: str = DEFAULT_TEMPLATE, loss_on: str = "response") -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.recipe_template, self.template = template, Template(template)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self.eos is None:
            raise DataError("tokenizer", "no end-of-sequence token", "a tokenizer with one", "Set tokenizer.eos_token.")
        self.special = special_words(tokenizer)

    def encode(self, rows: list[Messages]) -> list[TokenRow]:
        """Token rows of many conversations."""
        return encode_segments(self.tokenizer, [self.segments(row) for row in rows], self.bos, self.eos)

    def segments(self, messages: Messages) -> list[Segment]:
        """The row as stretches, without the bos."""
        everything = self.loss_on == "all"
        end = Segment(ids=(self.eos,), trained=True)
        if messages[0]["role"] == "text":
            text = messages[0]["content"]
            return [Segment(text, True, self._spells(text)), end]
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        talk = messages[1:] if messages[0]["role"] == "system" else messages
        result: list[Segment] = []
        for number, message in enumerate(talk):
            if message["role"] == "user":
                result += self._prompt(message["content"], system if number == 0 else "", everything)
            else:
                result += [Segment(message["content"], True, self._spells(message["content"])), end]
        return result

    def prompt_text(self, messages: Messages) -> str:
        """What stands before the last answer (or after the last question), as text without bos."""
        eos = self.tokenizer.eos_token
        return "".join(eos if part.ids else part.text for part in self.segments(before_answer(messages)))

    def prompt_ids(self, messages: Messages) -> list[int]:
        """What stands before the last answer (or after the last question), as ids, the bos included."""
        return self.prompts_ids([messages])[0]

    def prompts_ids(self, rows: list[Messages]) -> list[list[int]]:
        """`prompt_ids` of many conversations."""
        segments = [self.segments(before_answer(row)) for row in rows]
        return [row.ids for row in encode_segments(self.tokenizer, segments, self.bos, self.eos)]

    def _spells(self, text: str) -> bool:
        return self.special is not None and self.special.search(text) is not None

    def _prompt(self, prompt: str, system: str, trained: bool) -> list[Segment]:
        pieces = self.template.render(prompt, system)
        text = "".join(piece for piece, _ in pieces)
        if not self._spells(prompt + system):
            return [Segment(text, trained)]
        if not self._spells(self.template.literals):
            return [Segment(text, trained, plain=True)]
        return [Segment(piece, trained, plain=of_data) for piece, of_data in pieces]


def before_answer(messages: Messages) -> Messages:
    """The conversation without its last answer; as it is where it ends with a question."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def special_words(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern that finds the tokenizer's special tokens in a text."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = {word for word in [*tokenizer.all_special_tokens, *added] if word}
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))) if words else None


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over what decides a tokenizer's ids."""
    body = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    text = json.dumps([type(tokenizer).__name__, body, tokenizer.chat_template, special], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def encode_plain(tokenizer: Any, texts: list[str], plain: bool = False, added: bool = False) -> list[list[int]]:
    """Ids of texts without bos and eos. `plain`: special tokens that the text spells are text; `added`: with what the tokenizer adds."""
    if not texts:
        return []
    more = {"split_special_tokens": True} if plain else {}
    options = {
        "add_special_tokens": added,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
    }
    return tokenizer(texts, **options, **more)["input_ids"]


def encode_segments(tokenizer: Any, rows: list[list[Segment]], bos: int | None, eos: int) -> list[TokenRow]:
    """Encode rows of segments: each alone, and each that follows another together with the end of that one."""
    alone, tails, joined = {}, {}, {}
    for r, row in enumerate(rows):
        for s, segment in enumerate(row):
            if segment.ids is not None:
                continue
            alone[r, s] = (segment.text, segment.plain)
            before = row[s - 1] if s else None
            if before is not None and before.ids is None and before.plain == segment.plain:
                tail = before.text[-CONTEXT:]
                tails[r, s], joined[r, s] = (tail, segment.plain), (tail + segment.text, segment.plain)
    ids, head, both = (_encode_texts(tokenizer, texts) for texts in (alone, tails, joined))
    parts = dict(ids)
    for place, whole in both.items():
        start = head[place]
        if whole[: len(start)] == start and len(whole) > len(start):
            parts[place] = whole[len(start) :]
    return [_assemble(row, r, parts, bos, eos) for r, row in enumerate(rows)]


def _encode_texts(tokenizer: Any, texts: dict[tuple[int, int], tuple[str, bool]]) -> dict[tuple[int, int], list[int]]:
    known: dict[tuple[str, bool], list[int]] = {}
    for plain in (False, True):
        distinct = list(dict.fromkeys(text for text, flag in texts.values() if flag == plain))
        known.update(zip(((text, plain) for text in distinct), encode_plain(tokenizer, distinct, plain)))
    return {place: known[text] for place, text in texts.items()}


def _assemble(
    row: list[Segment], r: int, parts: dict[tuple[int, int], list[int]], bos: int | None, eos: int
) -> TokenRow:
    ids: list[int] = []
    trained: list[bool] = []
    for s, segment in enumerate(row):
        part = parts[r, s] if segment.ids is None else segment.ids
        ids += part
        trained += [segment.trained] * len(part)
    return one_bos(ids, trained, bos, eos)


def one_bos(ids: list[int], trained: list[bool], bos: int | None, eos: int | None) -> TokenRow:
    """The row with exactly one bos, at its head and untrained, whatever tokenizer and template wrote.

    Where bos and eos are one token only those at the head are bos. A tokenizer without bos gets none.
    """
    if bos is not None:
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        ids, trained = ids[start:], trained[start:]
        if bos != eos and bos in ids:
            kept = [place for place, token in enumerate(ids) if token != bos]
            ids, trained = [ids[place] for place in kept], [trained[place] for place in kept]
        ids, trained = [bos, *ids], [False, *trained]
    return TokenRow(ids, [False, *trained[1:]])
