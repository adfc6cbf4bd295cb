"""Answers of closed-book questions: what counts as right, and how much of it was said."""

from __future__ import annotations

import pytest

from sparsmith.evaluating.questions import alias_match, normalise_answer, strict_match, word_overlap


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Beatles", "beatles"),
        ("a U.S. state!", "u s state"),
        ("Theatre", "theatre"),
        ("Sinéad", "sinéad"),
        ("Café", "café"),
        ("snake_case", "snake case"),
        ("«Le Monde»", "le monde"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normal_form(text, plain):
    assert normalise_answer(text) == plain


def test_strict_match():
    assert strict_match(" New  York\n", "New York") == 1.0
    assert strict_match("new york", "New York") == 0.0
    assert strict_match("The Beatles", "Beatles") == 0.0


def test_any_alias_counts():
    assert alias_match("the beatles.", ["Fab Four", "Beatles"]) == 1.0
    assert alias_match("Rolling Stones", ["Fab Four", "Beatles"]) == 0.0
    assert alias_match("Beatles", "The Beatles") == 1.0, "a single alias may stand alone"
    assert alias_match("the", ["a"]) == alias_match("", [""]) == 0.0
    assert alias_match("x", []) == 0.0


def test_word_overlap():
    assert word_overlap("Beatles", "The Beatles") == 1.0
    # found: john lennon of 4 words, wanted: john winston lennon: 2 * 2 / (4 + 3)
    assert word_overlap("it was John Lennon", ["John Winston Lennon"]) == pytest.approx(4 / 7)
    assert word_overlap("John Lennon", ["Paul", "John Lennon"]) == 1.0, "the best alias"
    assert word_overlap("no no no", "no") == pytest.approx(2 / 4), "a word counts as often as it stands there"
    assert word_overlap("", "x") == word_overlap("x", []) == word_overlap("the", "the") == 0.0
