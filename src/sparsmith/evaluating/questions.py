"""Closed-book question answering: exact match, strict and over aliases, and the overlap of words, of one answer.

The rules of reading-comprehension benchmarks (Rajpurkar et al., arXiv 1606.05250 §6; Joshi et al., TriviaQA, arXiv 1705.03551 §6):
lower case, punctuation and the articles a, an, the left out, white space collapsed; the best of several right answers counts. Strict
exact match compares with the one canonical answer, after `answers.normalise` alone.

Functions of text; no recipe asks for them yet, as rows hold one completion and no aliases.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from sparsmith.evaluating.answers import normalise

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower case, punctuation and articles out, white space collapsed; NFC first. An answer of nothing else stays empty."""
    lower = unicodedata.normalize("NFC", text).lower().replace("_", " ")
    bare = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in lower)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def strict_match(answer: str, value: str) -> float:
    """1.0 where the answer is the canonical one, letter for letter."""
    return float(normalise(answer) == normalise(value))


def alias_match(answer: str, aliases: str | Sequence[str]) -> float:
    """1.0 where the normalised answer is one of the normalised aliases; an empty answer matches nothing."""
    found = normalise_answer(answer)
    return float(bool(found) and found in {normalise_answer(alias) for alias in _listed(aliases)})


def word_overlap(answer: str, aliases: str | Sequence[str]) -> float:
    """F1 over words with their counts, the best over the aliases, in [0, 1]."""
    return max(
        (_f1(normalise_answer(answer).split(), normalise_answer(a).split()) for a in _listed(aliases)), default=0.0
    )


def _f1(found: list[str], wanted: list[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _listed(aliases: str | Sequence[str]) -> Sequence[str]:
    return (aliases,) if isinstance(aliases, str) else aliases
