"""Evaluation rows met in training: planted rows are found, others are not, and the price is no loop over pairs."""

from __future__ import annotations

import io
import json
import random

import pytest

from sparsmith.data import OverlapReport, find_overlap
from sparsmith.data.overlap_report import SetOverlap
from sparsmith.data.overlap_search import Trained, fingerprint_of, tag_overlap
from sparsmith.errors import CheckpointError, DataError
from sparsmith.recipe.schema import EvalSource, TrainSource

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def sentence(seed: int, length: int = 30) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length))


def row(seed: int, length: int = 30, answer: str = "") -> dict[str, str]:
    return {"prompt": sentence(seed, length), "completion": answer or f"answer {seed}"}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def compare(folder, trained, held, names=("sums_a", "other_b"), **more) -> SetOverlap:
    """The report on one evaluation set against one training source."""
    write(folder / "t.jsonl", trained)
    write(folder / "e.jsonl", held)
    source = TrainSource(name=names[0], domain="d", path="t.jsonl")
    report = find_overlap(
        [Trained(source)], [EvalSource(name=names[1], domain="d", path="e.jsonl")], base_dir=folder, **more
    )
    return report.sets[names[1]]


def test_nothing_is_found_in_disjoint_rows(tmp_path):
    one = compare(tmp_path, [row(n) for n in range(300)], [row(n) for n in range(1000, 1200)])
    assert (one.exact_prompts, one.exact_rows, one.ngram_rows, one.met_rows, one.instruction_rows) == (0, 0, 0, 0, 0)
    assert one.rows == 200 and one.verdict == "clean" and one.examples == () and one.by_source == {}


def test_a_planted_row_is_found_whatever_its_print(tmp_path):
    held = [row(n) for n in range(1000, 1050)]
    asked = dict(
        held[7], prompt="  " + held[7]["prompt"].upper().replace(" ", ",  ") + "?!", completion="something else"
    )
    one = compare(tmp_path, [*[row(n) for n in range(100)], asked, held[20]], held)
    assert (one.exact_prompts, one.exact_rows, one.ngram_rows, one.met_rows) == (2, 1, 2, 2)
    told = {(meeting.kind, meeting.evaluated, meeting.trained, meeting.source) for meeting in one.examples}
    assert told == {
        ("prompt_and_answer", "e.jsonl:21", "t.jsonl:102", "sums_a"),
        ("prompt", "e.jsonl:8", "t.jsonl:101", "sums_a"),
    }
    assert one.by_source == {"sums_a": 2}


@pytest.mark.parametrize("side", ["prompt", "completion"])
@pytest.mark.parametrize(("length", "found"), [(13, 1), (12, 0)])
def test_a_run_of_13_words_is_a_hit_and_one_of_12_is_not(tmp_path, side, length, found):
    held = [row(n) for n in range(1000, 1040)]
    run = " ".join(held[3]["prompt"].split()[9 : 9 + length])
    planted = {**row(5), side: f"{sentence(6, 20)} {run.upper()}. {sentence(7, 20)}"}
    one = compare(tmp_path, [*[row(n) for n in range(50)], planted], held)
    assert (one.ngram_rows, one.met_rows, one.exact_prompts) == (found, found, 0)
    if found:
        (meeting,) = one.examples
        assert (meeting.kind, meeting.evaluated, meeting.trained, meeting.text) == (
            "ngram",
            "e.jsonl:4",
            "t.jsonl:51",
            run,
        )


def test_no_run_goes_across_two_texts(tmp_path):
    held = [row(1000)]
    given = held[0]["prompt"].split()
    split = {
        "prompt": sentence(1, 5) + " " + " ".join(given[:7]),
        "completion": " ".join(given[7:14]) + " " + sentence(2, 5),
    }
    assert compare(tmp_path, [split], held).ngram_rows == 0


def test_the_hits_are_those_of_a_loop_over_pairs(tmp_path):
    draw = random.Random(3)
    few = WORDS[:3]
    texts = [" ".join(draw.choice(few) for _ in range(draw.randint(1, 24))) for _ in range(400)]
    trained = [{"prompt": text, "completion": draw.choice(texts)} for text in texts[:200]]
    held = [{"prompt": text, "completion": "x"} for text in texts[200:]]
    one = compare(tmp_path, trained, held)

    def runs(text):
        split = text.split()
        return {tuple(split[i : i + 13]) for i in range(len(split) - 12)}

    known = set().union(*(runs(text) for pair in trained for text in pair.values()))
    prompts = {pair["prompt"] for pair in trained}
    hit = {n for n, pair in enumerate(held) if runs(pair["prompt"]) & known}
    same = {n for n, pair in enumerate(held) if pair["prompt"] in prompts}
    assert hit and same and len(hit) < 200
    # three words make many common phrases: a row of them alone is told apart, never lost
    assert one.ngram_rows + one.instruction_rows >= len(hit - same)
    assert one.ngram_rows <= len(hit) and one.exact_prompts == len(same)
    assert one.short_rows == sum(len(pair["prompt"].split()) < 13 for pair in held)


def test_a_template_is_no_contents(tmp_path):
    template = "Please answer the following question with true or false and give your reasons for it in one line"
    trained = [{"prompt": f"{template}: {sentence(n, 20)}", "completion": "true"} for n in range(200)]
    held = [{"prompt": f"{template}: {sentence(n, 20)}", "completion": "true"} for n in range(1000, 1040)]
    one = compare(tmp_path, trained, held)
    assert (one.ngram_rows, one.instruction_rows, one.verdict) == (0, 40, "clean")
    # the contents behind the same template are found, one row of forty
    leaked = {"prompt": f"Some other words: {sentence(1005, 20)}", "completion": "false"}
    one = compare(tmp_path, [*trained, leaked], held)
    assert (one.ngram_rows, one.instruction_rows, one.verdict) == (1, 39, "contaminated")


def test_many_templates_of_one_source_are_no_contents(tmp_path):
    templates = [sentence(5000 + n, 16) for n in range(20)]
    trained = [{"prompt": f"{templates[n % 20]} {sentence(n, 20)}", "completion": "x"} for n in range(600)]
    held = [{"prompt": f"{templates[n % 20]} {sentence(10_000 + n, 20)}", "completion": "x"} for n in range(60)]
    one = compare(tmp_path, trained, held)
    assert (one.ngram_rows, one.instruction_rows) == (0, 60)


@pytest.mark.parametrize(("leaked", "verdict"), [(0, "clean"), (2, "clean"), (3, "contaminated")])
def test_one_row_in_a_hundred_is_the_threshold(tmp_path, leaked, verdict):
    held = [row(n) for n in range(1000, 1200)]
    one = compare(tmp_path, [*[row(n) for n in range(50)], *held[:leaked]], held)
    assert one.met_rows == leaked and one.share == leaked / 200 and one.verdict == verdict


def test_a_family_makes_a_set_seen_and_leaked_rows_make_it_worse(tmp_path):
    held = [row(n) for n in range(1000, 1050)]
    names = ("gsm8k_cot", "gsm8k_test")
    one = compare(tmp_path, [row(1)], held, names)
    assert one.verdict == "seen" and one.shared == {"family gsm8k": ["gsm8k_cot"]}
    assert compare(tmp_path, [row(1), *held], held, names).verdict == "contaminated"


def test_a_preset_counts_by_its_families(tmp_path):
    one = compare(tmp_path, [row(1)], [row(2)], ("sums", "boolq"), presets=["flan2022"])
    assert one.verdict == "seen" and list(one.shared) == ["family boolq (in muffin, t0, niv2)"]


def test_turns_are_prompts_of_their_own(tmp_path):
    turns = [
        {
            "role": "system",
            "content": "Be brief, and answer in the way that was asked for by the one who pays for it all.",
        },
        {"role": "user", "content": sentence(1, 8)},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": sentence(2, 8)},
        {"role": "assistant", "content": "second"},
    ]
    held = [
        {"messages": [turns[1], turns[2]]},
        {"messages": [turns[3], turns[4]]},
        {"messages": [turns[1], turns[2], turns[3], {"role": "assistant", "content": "other"}]},
        {"messages": [{"role": "user", "content": turns[0]["content"]}, turns[2]]},  # a system text is not compared
        {"messages": [turns[3], turns[2]]},
    ]
    one = compare(tmp_path, [{"messages": turns}], held)
    assert (one.rows, one.exact_prompts, one.exact_rows, one.ngram_rows) == (5, 4, 2, 0)


def test_plain_text_is_compared_whole(tmp_path):
    held = [{"text": sentence(n, 30)} for n in range(1000, 1020)]
    one = compare(tmp_path, [{"text": sentence(1)}, {"text": held[4]["text"].upper()}], held)
    assert (one.exact_prompts, one.exact_rows, one.ngram_rows, one.met_rows) == (1, 1, 1, 1)


def test_hostile_rows(tmp_path):
    huge = " ".join(WORDS[i % 150] + str(i) for i in range(60_000))
    odd = [
        {"prompt": "?!... ---", "completion": "\u2026"},
        {"prompt": "\u200b", "completion": "x"},
        {"prompt": "\U0001f600\U0001f600", "completion": "\U0001f600"},
        {"prompt": "a\u0301" * 2000, "completion": "\u0000"},
        {"prompt": "\u4eca\u5929\u5929\u6c14\u600e\u4e48\u6837\u6211\u4eec\u53bb\u54ea\u91cc\u73a9", "completion": "y"},
        {"prompt": "word " * 20_000, "completion": "z"},
    ]
    one = compare(
        tmp_path, [*odd, {"prompt": huge, "completion": "x"}], [*odd, {"prompt": huge[5000:6000], "completion": "x"}]
    )
    # two texts without a word are not equal to each other; signs of Chinese are words
    assert one.rows == 7 and one.exact_prompts == 3 and one.ngram_rows >= 2
    mark = compare(tmp_path, [{"prompt": "???", "completion": "a"}], [{"prompt": "!!!", "completion": "a"}])
    assert (mark.exact_prompts, mark.short_rows, mark.verdict) == (0, 1, "clean")


def test_every_source_counts_and_one_that_two_stages_name_is_read_once(tmp_path):
    held = [row(n) for n in range(1000, 1010)]
    write(tmp_path / "a.jsonl", [held[0], row(1)])
    write(tmp_path / "b.jsonl", [held[0], held[1]])
    write(tmp_path / "e.jsonl", held)
    sources = [TrainSource(name=name, domain="d", path=f"{name}.jsonl") for name in "ab"]
    evaluated = [
        EvalSource(name="e", domain="d", path="e.jsonl"),
        EvalSource(name="few", domain="d", path="e.jsonl", limit=3),
    ]
    report = find_overlap([Trained(s, seed) for seed in (1, 2) for s in sources], evaluated, base_dir=tmp_path)
    assert report.trained == {"a": 2, "b": 2}
    assert report.sets["e"].by_source == {"a": 1, "b": 2} and report.sets["e"].met_rows == 2
    assert report.sets["few"].rows == 3
    assert set(report.files) == {"a.jsonl", "b.jsonl", "e.jsonl"}


def test_bad_rows_are_told_with_their_place(tmp_path):
    with pytest.raises(DataError, match=r"t\.jsonl:2"):
        compare(tmp_path, [row(1), {"prompt": None, "completion": "x"}], [row(2)])


def test_the_report_is_written_read_and_shown(tmp_path):
    from rich.console import Console

    held = [row(n) for n in range(1000, 1020)]
    write(tmp_path / "t.jsonl", [row(1), held[2]])
    write(tmp_path / "e.jsonl", held)
    trained = [Trained(TrainSource(name="t_rows", domain="d", path="t.jsonl"))]
    report = find_overlap(trained, [EvalSource(name="held_rows", domain="d", path="e.jsonl")], base_dir=tmp_path)
    assert OverlapReport.read(report.write(tmp_path / "new")) == report
    data = json.loads(json.dumps(report.as_dict()))
    assert data["seen"] == ["held_rows"] and data["sets"]["held_rows"]["share"] == 0.05
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "contaminated" in text and "1 (5.0%)" in text and "e.jsonl:3 = t.jsonl:2" in text
    for spoilt in ("[]", "{}", '{"format": 99}', json.dumps({**data, "sets": {"a": {"nam": "b"}}})):
        (tmp_path / "new" / "overlap.json").write_text(spoilt)
        with pytest.raises(CheckpointError):
            OverlapReport.read(tmp_path / "new" / "overlap.json")


def test_the_fingerprint_is_of_what_is_compared():
    source = TrainSource(name="t", domain="d", path="t.jsonl", limit=5)
    held = [EvalSource(name="e", domain="d", path="e.jsonl")]
    first = fingerprint_of([Trained(source, 1)], held)
    assert first == fingerprint_of([Trained(source.model_copy(update={"rate": 2.0, "licence": "MIT"}), 1)], held)
    others = [
        fingerprint_of([Trained(source, 2)], held),
        fingerprint_of([Trained(source.model_copy(update={"family": "x"}), 1)], held),
        fingerprint_of([Trained(source, 1)], held, ["p3"]),
        fingerprint_of([Trained(source, 1)], [held[0].model_copy(update={"limit": 3})]),
    ]
    assert len({first, *others}) == 5


def test_tags_alone_read_no_row():
    trained = [Trained(TrainSource(name="gsm8k", domain="d", path="nowhere.jsonl"))]
    held = [EvalSource(name=name, domain="d", path="none.jsonl") for name in ("gsm8k_test", "mmlu")]
    report = tag_overlap(trained, held)
    assert report.clean() == ["mmlu"] and report.seen() == ["gsm8k_test"]
    assert not report.sets["mmlu"].searched and "no row was compared" in report.basis
