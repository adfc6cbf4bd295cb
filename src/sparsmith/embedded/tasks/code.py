"""Python expressions: what they evaluate to, or the bracket that they lack."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from sparsmith.embedded.tasks.task import Question, Task

DOMAIN = "code"
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _numbers(random: Random, count: int) -> list[int]:
    return [random.randint(0, 9) for _ in range(count)]


def _value(expression: str, value: object) -> Question:
    return Question(expression, f">>> {expression}", repr(value))


def length(random: Random, level: int) -> Question:
    numbers = _numbers(random, random.randint(1, 1 + 2 * level))
    return _value(f"len({numbers})", len(numbers))


def index(random: Random, level: int) -> Question:
    numbers = _numbers(random, level + 2)
    place = (random.choice((0, -1)), random.randrange(level + 2), random.randrange(-level - 2, level + 2))[level - 1]
    return _value(f"{numbers}[{place}]", numbers[place])


def type_name(random: Random, level: int) -> Question:
    number = random.randrange(10, 10 ** (level + 1))
    word = "".join(random.sample(ascii_lowercase, level + 1))
    samples = (number, word, number / 10, [number], {word: number}, (number, word))
    value = random.choice(samples[: 2 * level])
    return Question(repr(value), f">>> type({value!r}).__name__", type(value).__name__)


def close_brackets(random: Random, level: int) -> Question:
    """The closing brackets that a line lacks, in order."""
    name = random.choice(("f", "g", "run", "show", "print", "send"))
    opened = ["(", *(random.choice("([{") for _ in range(level - 1))]
    numbers = [str(random.randint(0, 99)) for _ in opened]
    line = name + "".join(f"{bracket}{number}, " for bracket, number in zip(opened, numbers)).removesuffix(", ")
    return Question(line, f"Missing brackets: {line}", "".join(_CLOSING[bracket] for bracket in reversed(opened)))


def comparison(random: Random, level: int) -> Question:
    a, b = (random.randrange(10 ** min(level, 2)) for _ in range(2))
    sign = random.choice(("<", ">", "==")[: min(level + 1, 3)])
    if sign == "==" and random.random() < 0.5:  # two random numbers would almost never be equal
        b = a
    value = {"<": a < b, ">": a > b, "==": a == b}[sign]
    return _value(f"{a} {sign} {b}", value)


def list_range(random: Random, level: int) -> Question:
    start = random.randint(0, 30)
    step = random.choice(((1,), (1, 2), (2, 3, 5))[level - 1])
    stop = start + step * random.randint(1, 2 + level)
    expression = f"list(range({start}, {stop}))" if step == 1 else f"list(range({start}, {stop}, {step}))"
    return _value(expression, list(range(start, stop, step)))


def reverse_list(random: Random, level: int) -> Question:
    numbers = _numbers(random, level + 1)
    return _value(f"{numbers}[::-1]", numbers[::-1])


def maximum(random: Random, level: int) -> Question:
    numbers = _numbers(random, level + 1)
    return _value(f"max({numbers})", max(numbers))


TASKS = tuple(
    Task(name=ask.__name__, domain=DOMAIN, ask=ask)
    for ask in (length, index, type_name, close_brackets, comparison, list_range, reverse_list, maximum)
)
