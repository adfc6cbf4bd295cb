"""The options of a task's row: read without their marks, and written in one of several styles.

A style marks each option and says how the answer is written: behind dashes it is the option's text, behind letters the letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsmith.data.rows import RowFault, kind_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARK = re.compile(r"\(?([A-Z])[).:]\s*(?=\S)")


@dataclass(frozen=True)
class Choices:
    """Options without marks, and which is right."""

    texts: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Style:
    """A way to write options and answer. Both functions take the option's number, from 0, and its text."""

    name: str
    line: Callable[[int, str], str]
    answer: Callable[[int, str], str]
    most: int = 10_000
    """Options that it can mark."""

    def block(self, head: str, texts: Sequence[str]) -> str:
        """The options as they stand in a question."""
        return "\n".join([head, *(self.line(number, text) for number, text in enumerate(texts))])


HEADS = ("Options:", "Choices:", "Choose one:", "Possible answers:", "The options are:", "OPTIONS:")
STYLES = (
    Style("dashes", lambda n, text: f"- {text}", lambda n, text: text),
    Style("stars", lambda n, text: f"* {text}", lambda n, text: text),
    Style("letters", lambda n, text: f"({LETTERS[n]}) {text}", lambda n, text: f"({LETTERS[n]})", 26),
    Style("letters_dot", lambda n, text: f"{LETTERS[n]}. {text}", lambda n, text: LETTERS[n], 26),
    Style("letters_text", lambda n, text: f"({LETTERS[n]}) {text}", lambda n, text: f"({LETTERS[n]}) {text}", 26),
    Style("numbers", lambda n, text: f"{n + 1}. {text}", lambda n, text: str(n + 1)),
    Style("numbers_text", lambda n, text: f"{n + 1}) {text}", lambda n, text: text),
)
"""In the order from which they are drawn."""


def styles_for(name: str, most: int) -> tuple[Style, ...]:
    """The styles to draw from for rows of up to `most` options; (), where the asked-for one cannot mark so many."""
    return tuple(style for style in STYLES if name in ("random", style.name) and style.most >= most)


def choices_of(options: Sequence[str], answer: object) -> Choices:
    """Options and answer as a row has them -> the options without marks, and the right one.

    The answer may be an option, its index from 0, its letter, or what stands before its colon (`Sentence A`).

    Raises:
        RowFault: it is none of them.
    """
    if len(options) < 2:
        raise RowFault(f"{len(options)} options", "at least two", "Mend the row.", "options")
    marks = [_MARK.match(option) for option in options]
    letters = [found.group(1) for found in marks if found]
    marked = letters == list(LETTERS[: len(options)])
    texts = tuple(option[found.end() :] if found and marked else option for option, found in zip(options, marks))
    right = _index(options, texts, letters if marked else [], answer)
    if right is None:
        found = f"{kind_of(answer)} as the answer, none of {len(options)} options"
        raise RowFault(found, "one of the options, its letter, or its index from 0", "Mend the row.", "answer")
    return Choices(texts, right)


def _index(options: Sequence[str], texts: Sequence[str], letters: list[str], answer: object) -> int | None:
    if isinstance(answer, bool):
        answer = "true" if answer else "false"
    if isinstance(answer, int):
        return answer if 0 <= answer < len(options) else None
    if not isinstance(answer, str):
        return None
    said = answer.strip()
    for among in (options, texts):
        if said in among:
            return list(among).index(said)
    bare = said.strip("().:")
    if bare in letters:
        return letters.index(bare)
    heads = [option.partition(":")[0].strip() for option in options]
    return heads.index(said) if heads.count(said) == 1 else None
