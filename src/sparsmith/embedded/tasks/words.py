"""Closed word lists of the text tasks. Every answer that depends on meaning rests on these lists alone."""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "horse", "cow", "bird", "snake", "mouse", "tiger", "sheep", "lion", "frog", "wolf"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "grey"),
    "food": ("bread", "cheese", "rice", "soup", "cake", "meat", "egg", "butter", "salad", "pizza"),
    "tool": ("hammer", "saw", "drill", "knife", "brush", "shovel", "axe", "ladder"),
    "place": ("city", "school", "park", "river", "house", "forest", "beach", "street", "garden", "island"),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
}
"""No word belongs to two categories."""

NOUNS: tuple[str, ...] = tuple(word for words in CATEGORIES.values() for word in words)

PLURALS: dict[str, str] = {
    "dog": "dogs",
    "cat": "cats",
    "horse": "horses",
    "bird": "birds",
    "book": "books",
    "table": "tables",
    "car": "cars",
    "house": "houses",
    "apple": "apples",
    "door": "doors",
}
IRREGULAR_PLURALS: dict[str, str] = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "knife": "knives",
}

LIKING = ("like", "love", "enjoy")
DISLIKING = ("hate", "dislike", "detest")
PRAISE = ("good", "great", "nice", "lovely", "perfect")
BLAME = ("bad", "awful", "terrible", "ugly", "horrible")

PEOPLE = ("Tom", "Anna", "John", "Mary", "Sam", "Lucy", "He", "She", "My friend", "The teacher")
VERBS = ("walk", "talk", "look", "work", "play", "cook", "jump", "help", "wait", "shout")
"""Regular: the third person adds -s, the past -ed, the participle -ing."""
