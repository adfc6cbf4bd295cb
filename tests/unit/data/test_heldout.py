"""One file for training and evaluation: two sides without a shared prompt, the same in every run."""

from __future__ import annotations

import json

from sparsmith.data.heldout import is_held_out
from sparsmith.data.sources import read_rows
from sparsmith.recipe.schema import EvalSource, TrainSource


def message(prompt: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "x"},
    ]


def test_about_the_share_is_held_out():
    prompts = [f"question {number}" for number in range(4000)]
    held = [prompt for prompt in prompts if is_held_out(message(prompt), 0.1)]
    assert 320 <= len(held) <= 480
    more = {prompt for prompt in prompts if is_held_out(message(prompt), 0.2)}
    assert set(held) <= more


def test_spaces_case_and_the_system_text_make_no_difference():
    for number in range(50):
        plain = message(f"what is {number}?")
        other = message(f"  What   IS {number}?\n")[1:]
        assert is_held_out(plain, 0.5) == is_held_out(other, 0.5)


def test_the_sides_never_change_between_releases():
    assert [n for n in range(40) if is_held_out(message(f"question {n}"), 0.2)] == [1, 11, 13, 18, 19, 22, 27]


def test_the_two_sides_make_the_whole(tmp_path):
    rows = [{"prompt": f"question {n % 70}", "completion": f"answer {n}"} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"name": "a", "domain": "d", "path": "rows.jsonl", "heldout": 0.3}
    train = read_rows(TrainSource(**common, part="train"), base_dir=tmp_path)
    held = read_rows(EvalSource(**common, part="heldout", limit=10), base_dir=tmp_path)
    prompts = [{example.messages[0]["content"] for example in side.rows} for side in (train, held)]
    assert not prompts[0] & prompts[1]
    assert len(held.rows) == 10
    assert len(train.rows) + train.filtered == 200 == len(held.rows) + held.limited + held.filtered
    assert train.filtered == held.limited + 10
