"""Letters and words. Letters are written apart, since a subword vocabulary hides how a word is spelled."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from sparsmith.embedded.tasks.task import Question, Task
from sparsmith.embedded.tasks.words import CATEGORIES, NOUNS, OPPOSITES

DOMAIN = "text"


def _letters(random: Random, count: int) -> list[str]:
    return random.sample(ascii_lowercase, count)


def capitals(random: Random, level: int) -> Question:
    letters = " ".join(_letters(random, level + 1))
    return Question(letters, f"Write in capitals: {letters}", letters.upper())


def reverse(random: Random, level: int) -> Question:
    letters = _letters(random, level + 1)
    shown = " ".join(letters)
    return Question(shown, f"Write backwards: {shown}", " ".join(reversed(letters)))


def last_word(random: Random, level: int) -> Question:
    words = random.sample(NOUNS, 2 * level)
    shown = " ".join(words)
    return Question(shown, f"Last word: {shown}", words[-1])


def first_letter(random: Random, level: int) -> Question:
    words = random.sample(NOUNS, level)
    shown = " ".join(words)
    return Question(shown, f"First letter of each word: {shown}", " ".join(word[0] for word in words))


def count_words(random: Random, level: int) -> Question:
    words = random.choices(NOUNS, k=random.randint(1, 2 + 2 * level))
    shown = " ".join(words)
    return Question(shown, f"How many words: {shown}", str(len(words)))


def alphabet_order(random: Random, level: int) -> Question:
    letters = _letters(random, level + 1)
    ordered = sorted(letters)
    return Question(" ".join(ordered), f"Sort the letters: {' '.join(letters)}", " ".join(ordered))


def category(random: Random, level: int) -> Question:
    """One word of the category asked for, among `level` words of other categories."""
    names = random.sample(sorted(CATEGORIES), level + 1)
    words = [random.choice(CATEGORIES[name]) for name in names]
    answer = words[0]
    content = f"{names[0]}:{','.join(sorted(words))}"
    random.shuffle(words)
    return Question(content, f"Which one is a kind of {names[0]}: {', '.join(words)}?", answer)


def opposite(random: Random, level: int) -> Question:
    """The opposite of a word, among `level` words of other pairs."""
    chosen = random.sample(OPPOSITES, level + 1)
    asked, answer = random.sample(chosen[0], 2)
    words = [answer, *(random.choice(pair) for pair in chosen[1:])]
    content = f"{asked}:{','.join(sorted(words))}"
    random.shuffle(words)
    return Question(content, f"Which one is the opposite of {asked}: {', '.join(words)}?", answer)


TASKS = tuple(
    Task(name=ask.__name__, domain=DOMAIN, ask=ask)
    for ask in (capitals, reverse, last_word, first_letter, count_words, alphabet_order, category, opposite)
)
