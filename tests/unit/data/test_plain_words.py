"""Texts as bare words, and runs of words as numbers, against loops."""

from __future__ import annotations

import random

import pytest

from sparsmith.data.plain_words import FlatWords, WordHashes, normalised, words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "  what IS   it"),
        ("caf\u00e9 au lait", "CAFE\u0301  au, lait!"),
        ("STRASSE", "stra\u00dfe"),
        ("\uff21\uff22 1", "ab 1"),
        ("a_b", "a b"),
        ("\u201cQuoted\u201d \u2014 text\u2026", "quoted text"),
        ("\u4eca\u5929 \u5929\u6c14", "\u4eca\u5929\u5929\u6c14\u3002"),
    ],
)
def test_prints_of_one_text_are_equal(one, other):
    assert normalised(one) == normalised(other) != ""
    assert words(one) == words(other)


def test_other_texts_stay_apart():
    sums = ["3 + 4", "3 - 4", "3 * 4", "3 / 4", "3 = 4", "3 < 4", "34", "3 4"]
    assert len({normalised(text) for text in sums}) == len(sums)
    assert words("3 + 4") == ["3", "4"]
    assert normalised("well-known and/or") == "well known and or"


@pytest.mark.parametrize("text", ["", "   \n", "?!...", "\u200b", "___"])
def test_texts_without_a_word(text):
    assert normalised(text) == "" and words(text) == []


def test_signs_that_write_no_spaces_are_words_one_by_one():
    assert words("\u4eca\u5929\u5929\u6c14 ok") == ["\u4eca", "\u5929", "\u5929", "\u6c14", "ok"]


@pytest.mark.parametrize("n", [1, 2, 3, 13])
def test_runs_of_words_are_those_of_a_loop(n):
    draw = random.Random(n)
    texts = [[draw.choice("abc") for _ in range(draw.choice([0, 1, 2, 12, 13, 14, 30]))] for _ in range(60)]
    hashes, starts = FlatWords.of(texts, WordHashes()).ngrams(n)
    expected, first = [], 0
    for text in texts:
        expected += [(tuple(text[i : i + n]), first + i) for i in range(len(text) - n + 1)]
        first += len(text)
    assert starts.tolist() == [start for _, start in expected]
    by_run: dict = {}
    for (run, _), value in zip(expected, hashes.tolist()):
        assert by_run.setdefault(run, value) == value
    assert len(set(by_run.values())) == len(by_run)


def test_no_words_no_runs():
    for texts in ([], [[]], [["a"], ["b"]]):
        hashes, starts = FlatWords.of(texts, WordHashes()).ngrams(13)
        assert len(hashes) == len(starts) == 0


def test_hashes_are_the_same_in_every_process():
    assert WordHashes()["word"] == 0x4AA4CF27D7C78E95
