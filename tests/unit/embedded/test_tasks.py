"""The generator's claims: right answers (worked out here a second time, from the prompt alone), a split that holds, order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from sparsmith.embedded.tasks import DOMAINS, LEVELS, TASKS, generate, write_jsonl
from sparsmith.embedded.tasks.task import HELD_OUT, HELD_OUT_PERCENT, TRAIN, split_of
from sparsmith.embedded.tasks.words import (
    BLAME,
    CATEGORIES,
    DISLIKING,
    IRREGULAR_PLURALS,
    LIKING,
    NOUNS,
    PLURALS,
    PRAISE,
)
from sparsmith.errors import UsageError


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return generate(TRAIN, per_task=240, seed=3) + generate(HELD_OUT, per_task=120, seed=3)


def _numbers(prompt: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", prompt)]


def _after_colon(prompt: str) -> list[str]:
    return prompt.split(": ", 1)[1].split()


def _next(prompt: str) -> str:
    first, second, third = _numbers(prompt)
    assert second - first == third - second
    return str(third + third - second)


def _kind(prompt: str) -> str:
    word, shown = re.fullmatch(r"What is (\w+): (.*)\?", prompt).groups()
    (answer,) = [name for name in shown.split(", ") if word in CATEGORIES[name]]
    return answer


def _feeling(prompt: str) -> str:
    sentence = prompt.split(": ")[1].rstrip(".").split()
    bad = sum(word in (*BLAME, *DISLIKING, "not") for word in sentence)
    return "negative" if bad % 2 else "positive"  # two negatives cancel


def _time(prompt: str) -> str:
    if " will " in prompt:
        return "future"
    return "past" if re.search(r"\b(did|was|\w+ed)\b", prompt.split(": ")[1]) else "present"


def _many(prompt: str) -> str:
    return "many" if prompt.split()[-1] in (*PLURALS.values(), *IRREGULAR_PLURALS.values()) else "one"


def _closing(prompt: str) -> str:
    pairs = {"(": ")", "[": "]", "{": "}"}
    return "".join(pairs[sign] for sign in prompt if sign in pairs)[::-1]


def _evaluated(prompt: str) -> str:
    return repr(
        eval(prompt.removeprefix(">>> "), {"__builtins__": {"len": len, "max": max, "list": list, "range": range}})
    )


SOLVERS = {
    "add": lambda p: str(sum(_numbers(p))),
    "larger": lambda p: str(max(_numbers(p))),
    "less_than": lambda p: "no" if _numbers(p)[0] >= _numbers(p)[1] else "yes",
    "parity": lambda p: "even" if p.split()[1][-1] in "02468" else "odd",
    "multiple_of_five": lambda p: "yes" if p.split()[1][-1] in "05" else "no",
    "count_digits": lambda p: str(len(re.sub(r"\D", "", p))),
    "next_number": _next,
    "times_ten": lambda p: str(_numbers(p)[0]) + "0" * (len(str(_numbers(p)[1])) - 1),
    "capitals": lambda p: " ".join(chr(ord(letter) - 32) for letter in _after_colon(p)),
    "reverse": lambda p: p.split(": ")[1][::-1],
    "last_word": lambda p: p.rsplit(" ", 1)[1],
    "sentiment": _feeling,
    "tense": _time,
    "one_or_many": _many,
    "count_words": lambda p: str(p.split(": ")[1].count(" ") + 1),
    "category": _kind,
    "length": _evaluated,
    "index": _evaluated,
    "comparison": _evaluated,
    "list_range": _evaluated,
    "reverse_list": _evaluated,
    "maximum": _evaluated,
    "type_name": lambda p: type(eval(re.fullmatch(r">>> type\((.*)\)\.__name__", p)[1], {})).__name__,
    "close_brackets": _closing,
}


def test_every_answer_is_right(rows):
    assert {task.name for task in TASKS} == set(SOLVERS)
    wrong = [(row, SOLVERS[row["task"]](row["prompt"])) for row in rows]
    assert [pair for pair in wrong if pair[0]["completion"] != pair[1]] == []


def test_answers_are_short_and_plain(rows):
    for row in rows:
        assert set(row) == {"prompt", "completion", "domain", "task", "level"}
        assert row["completion"] == row["completion"].strip()
        assert 0 < len(row["completion"]) <= 24
        assert "\n" not in row["prompt"] + row["completion"]
        assert "###" not in row["prompt"]  # would look like a turn of the template


def test_no_question_stands_on_both_sides():
    """By construction: whatever the seeds and sizes, and also where a question may be written in two orders."""

    def questions(split: str, seed: int) -> set[tuple]:
        return {
            (row["task"], tuple(sorted(re.findall(r"\w+", row["prompt"]))))
            for row in generate(split, per_task=120, seed=seed)
            if row["task"] in ("add", "larger", "category")
        }

    def prompts(split: str, seed: int) -> set[tuple]:
        return {(row["task"], row["prompt"]) for row in generate(split, per_task=120, seed=seed)}

    assert prompts(TRAIN, 0).isdisjoint(prompts(HELD_OUT, 1))
    assert prompts(TRAIN, 1).isdisjoint(prompts(HELD_OUT, 1))
    assert len(prompts(HELD_OUT, 1)) > 2000
    assert questions(TRAIN, 0).isdisjoint(questions(HELD_OUT, 7))


def test_the_split_takes_the_share_it_says():
    sides = Counter(split_of("add", str(i)) for i in range(20_000))
    assert sides[HELD_OUT] / 20_000 == pytest.approx(HELD_OUT_PERCENT / 100, abs=0.01)


def test_domains_tasks_and_levels_are_balanced():
    for domain in DOMAINS:
        assert sum(task.domain == domain for task in TASKS) >= 6
    rows = generate(TRAIN, total=1000, seed=5)
    assert len(rows) == 1000
    by_domain = Counter(row["domain"] for row in rows)
    assert max(by_domain.values()) - min(by_domain.values()) <= 1
    for domain in DOMAINS:
        by_task = Counter(row["task"] for row in rows if row["domain"] == domain)
        assert max(by_task.values()) - min(by_task.values()) <= 1
    for task in TASKS:
        by_level = Counter(row["level"] for row in rows if row["task"] == task.name)
        assert max(by_level.values()) - min(by_level.values()) <= 1


def test_yes_and_no_are_about_as_frequent():
    """A model that always gives one answer must not look good."""
    rows = generate(HELD_OUT, per_task=150, seed=2)
    for task in ("less_than", "parity", "multiple_of_five", "sentiment", "one_or_many", "comparison"):
        answers = Counter(row["completion"] for row in rows if row["task"] == task)
        assert max(answers.values()) <= 0.62 * sum(answers.values()), answers


def test_rows_differ_while_the_task_has_enough_questions():
    rows = generate(TRAIN, per_task=200, seed=9)
    by_task = Counter(row["task"] for row in {(row["task"], row["prompt"]): row for row in rows}.values())
    assert min(by_task.values()) >= 150
    for task in ("sentiment", "tense", "capitals", "reverse", "last_word", "type_name"):
        assert by_task[task] == 200


def test_same_seed_same_rows_in_another_process():
    code = "import json; from sparsmith.embedded.tasks import generate; print(json.dumps(generate('train', total=90, seed=4)))"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(result.stdout) == generate(TRAIN, total=90, seed=4)
    assert generate(TRAIN, total=90, seed=4) != generate(TRAIN, total=90, seed=5)


def test_more_rows_keep_those_there_were():
    few = {(row["task"], row["prompt"]) for row in generate(TRAIN, per_task=20, seed=1)}
    assert few <= {(row["task"], row["prompt"]) for row in generate(TRAIN, per_task=60, seed=1)}


@pytest.mark.parametrize("level", LEVELS)
def test_one_level_alone(level):
    rows = generate(HELD_OUT, per_task=6, levels=[level])
    assert {row["level"] for row in rows} == {level}


def test_one_domain_alone():
    assert {row["domain"] for row in generate(TRAIN, total=30, domains=["text"])} == {"text"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"split": "test", "total": 3},
        {"split": "train"},
        {"split": "train", "total": 3, "per_task": 3},
        {"split": "train", "total": 3, "levels": [4]},
        {"split": "train", "total": 3, "levels": []},
        {"split": "train", "total": 3, "domains": ["poetry"]},
    ],
)
def test_a_wrong_call_is_told_so(arguments):
    with pytest.raises(UsageError):
        generate(**arguments)


def test_files_hold_the_rows(tmp_path):
    paths = write_jsonl(tmp_path / "data", seed=6, train=60, held_out=30)
    for split, count in (("train", 60), ("held_out", 30)):
        lines = paths[split].read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == generate(split, total=count, seed=6)


def test_word_lists_leave_one_answer_only():
    assert len(NOUNS) == len(set(NOUNS))
    assert not {*LIKING, *PRAISE} & {*DISLIKING, *BLAME}
    assert not {*PLURALS, *IRREGULAR_PLURALS} & {*PLURALS.values(), *IRREGULAR_PLURALS.values()}
