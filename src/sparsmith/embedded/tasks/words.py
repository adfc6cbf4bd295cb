"""Closed word lists of the text tasks. Every answer that depends on meaning rests on these lists alone."""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "horse", "cow", "bird", "fish", "mouse", "rabbit", "sheep", "lion", "frog", "duck"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "grey"),
    "food": ("bread", "cheese", "rice", "soup", "cake", "meat", "egg", "butter", "salad", "pizza"),
    "tool": ("hammer", "saw", "drill", "knife", "brush", "shovel", "axe", "ladder"),
    "place": ("city", "school", "park", "river", "house", "forest", "beach", "street", "garden", "island"),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
}
"""No word belongs to two categories."""

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("day", "night"),
    ("good", "bad"),
    ("old", "young"),
    ("fast", "slow"),
    ("open", "closed"),
    ("happy", "sad"),
    ("rich", "poor"),
    ("long", "short"),
    ("left", "right"),
    ("first", "last"),
    ("wet", "dry"),
    ("hard", "soft"),
    ("full", "empty"),
    ("high", "low"),
    ("light", "dark"),
)
"""No word stands in two pairs."""

NOUNS: tuple[str, ...] = tuple(word for words in CATEGORIES.values() for word in words)
