"""Arithmetic on small whole numbers. Level 1 fits in the head, level 3 asks for carrying or for longer numbers."""

from __future__ import annotations

from random import Random

from sparsmith.embedded.tasks.task import Question, Task

DOMAIN = "maths"


def _digits(random: Random, count: int) -> int:
    """A number with exactly `count` digits."""
    return random.randrange(10 ** (count - 1), 10**count)


def _pair(random: Random, digits: int) -> tuple[int, int]:
    """Two different numbers with the same count of digits."""
    first = _digits(random, digits)
    second = _digits(random, digits)
    while second == first:
        second = _digits(random, digits)
    return first, second


def add(random: Random, level: int) -> Question:
    high_first, high_second = ((9, 9), (89, 9), (89, 89))[level - 1]
    a, b = random.randint(0, high_first), random.randint(0, high_second)
    low, high = sorted((a, b))
    return Question(f"{low}+{high}", f"{a} + {b} =", str(a + b))


def larger(random: Random, level: int) -> Question:
    a, b = _pair(random, level)
    low, high = sorted((a, b))
    return Question(f"{low},{high}", f"Which number is larger, {a} or {b}?", str(high))


def less_than(random: Random, level: int) -> Question:
    a, b = _pair(random, level)
    return Question(f"{a}<{b}", f"Is {a} less than {b}?", "yes" if a < b else "no")


def parity(random: Random, level: int) -> Question:
    number = _digits(random, level + 1)
    return Question(str(number), f"Is {number} even or odd?", "odd" if number % 2 else "even")


def multiple_of_five(random: Random, level: int) -> Question:
    number = _digits(random, level + 1)
    if random.random() < 0.5:  # one number in five would make "no" right four times out of five
        number -= number % 5
    return Question(str(number), f"Is {number} a multiple of 5?", "no" if number % 5 else "yes")


def count_digits(random: Random, level: int) -> Question:
    number = _digits(random, random.randint(2, 3 + level))
    return Question(str(number), f"How many digits has {number}?", str(len(str(number))))


def next_number(random: Random, level: int) -> Question:
    step = random.choice(((1,), (2, 10), (3, 4, 5))[level - 1])
    first = random.randint(1, 69)
    shown = [first + i * step for i in range(3)]
    return Question(f"{first},{step}", f"Next number: {', '.join(map(str, shown))}", str(first + 3 * step))


def times_ten(random: Random, level: int) -> Question:
    factor = random.choice(((10,), (10, 100), (10, 100, 1000))[level - 1])
    number = _digits(random, level + 1)
    return Question(f"{number}*{factor}", f"{number} * {factor} =", str(number * factor))


TASKS = tuple(
    Task(name=ask.__name__, domain=DOMAIN, ask=ask)
    for ask in (add, larger, less_than, parity, multiple_of_five, count_digits, next_number, times_ten)
)
