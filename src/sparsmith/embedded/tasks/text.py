"""Sentences, words and letters. Letters are written apart, since a subword vocabulary hides how a word is spelled."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from sparsmith.embedded.tasks import words as lists
from sparsmith.embedded.tasks.task import Question, Task

DOMAIN = "text"


def _letters(random: Random, count: int) -> str:
    return " ".join(random.sample(ascii_lowercase, count))


def sentiment(random: Random, level: int) -> Question:
    """Of a verb (level 1), of an adjective too (2), and turned round by a negation (3)."""
    is_liked = random.random() < 0.5
    person = random.choice(("I", "We", "They", "You"))
    colour, thing = random.choice(lists.CATEGORIES["colour"]), random.choice(tuple(lists.PLURALS))
    negated = level == 3 and random.random() < 0.5
    if level > 1 and random.random() < 0.5:
        adjective = random.choice(lists.PRAISE if is_liked else lists.BLAME)
        sentence = f"The {colour} {thing} is {'not ' if negated else ''}{adjective}."
    else:
        verb = random.choice(lists.LIKING if is_liked else lists.DISLIKING)
        sentence = f"{person} {'do not ' if negated else ''}{verb} the {colour} {thing}."
    answer = "positive" if is_liked != negated else "negative"
    return Question(sentence, f"Positive or negative: {sentence}", answer)


def tense(random: Random, level: int) -> Question:
    """Simple forms (level 1), with a negation (2), progressive (3)."""
    verb = random.choice(lists.VERBS)
    forms = (
        {"past": f"{verb}ed", "present": f"{verb}s", "future": f"will {verb}"},
        {"past": f"did not {verb}", "present": f"does not {verb}", "future": f"will not {verb}"},
        {"past": f"was {verb}ing", "present": f"is {verb}ing", "future": f"will be {verb}ing"},
    )[level - 1]
    answer = random.choice(("past", "present", "future"))
    place = random.choice(("park", "school", "garden", "street", "house"))
    sentence = f"{random.choice(lists.PEOPLE)} {forms[answer]} in the {place}."
    return Question(sentence, f"Past, present or future: {sentence}", answer)


def one_or_many(random: Random, level: int) -> Question:
    """Told by the article too (level 1), by the ending alone (2), by an irregular form (3)."""
    nouns = lists.IRREGULAR_PLURALS if level == 3 else lists.PLURALS
    noun, colour = random.choice(tuple(nouns)), random.choice(lists.CATEGORIES["colour"])
    answer = random.choice(("one", "many"))
    article = {"one": "a", "many": "some"}[answer] if level == 1 else random.choice(("the", "my", "your", "our"))
    phrase = f"{article} {colour} {noun if answer == 'one' else nouns[noun]}"
    return Question(phrase, f"One or many: {phrase}", answer)


def category(random: Random, level: int) -> Question:
    """The category of a word, among `level` others."""
    names = random.sample(sorted(lists.CATEGORIES), level + 1)
    word, answer = random.choice(lists.CATEGORIES[names[0]]), names[0]
    content = f"{word}:{','.join(sorted(names))}"
    random.shuffle(names)
    return Question(content, f"What is {word}: {', '.join(names)}?", answer)


def count_words(random: Random, level: int) -> Question:
    words = random.choices(lists.NOUNS, k=random.randint(1, 2 + 2 * level))
    shown = " ".join(words)
    return Question(shown, f"How many words: {shown}", str(len(words)))


def last_word(random: Random, level: int) -> Question:
    words = random.sample(lists.NOUNS, 2 * level)
    shown = " ".join(words)
    return Question(shown, f"Last word: {shown}", words[-1])


def capitals(random: Random, level: int) -> Question:
    letters = _letters(random, level + 1)
    return Question(letters, f"Write in capitals: {letters}", letters.upper())


def reverse(random: Random, level: int) -> Question:
    letters = _letters(random, level + 1)
    return Question(letters, f"Write backwards: {letters}", letters[::-1])


TASKS = tuple(
    Task(name=ask.__name__, domain=DOMAIN, ask=ask)
    for ask in (sentiment, tense, one_or_many, category, count_words, last_word, capitals, reverse)
)
