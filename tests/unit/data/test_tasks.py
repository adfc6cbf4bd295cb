"""Mixtures of tasks: rates in two levels, how a row is shown, worked examples, limits, cache, resume."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsmith.data import load_data
from sparsmith.data.choices import choices_of
from sparsmith.data.mixture import Part, epoch_rows, parts_of_tasks, shares, stream
from sparsmith.data.render import Rendering
from sparsmith.data.rows import RowFault
from sparsmith.data.view import view_of
from sparsmith.errors import DataError
from sparsmith.recipe.mixture import PAPER, MixtureSettings, Variants
from sparsmith.recipe.schema import EvalSource
from tests.kit.rowfiles import chat_tokenizer, write_jsonl
from tests.kit.tasks import COLOURS, mixture, task_settings, write_tasks

TOKENIZER = chat_tokenizer(None)


@pytest.fixture
def home(tmp_path):
    write_tasks(tmp_path)
    return tmp_path


def loaded(settings, home, **more):
    return load_data(settings, TOKENIZER, **{"seed": 1, "base_dir": home, "rows_needed": 84, **more})


def texts(data) -> list[tuple[str, str, str, str]]:
    """(task, place, input, answer) of each row of the stream."""
    found = []
    for index in range(len(data.train)):
        item = data.train[index]
        start = int((item["labels"] >= 0).nonzero()[0])
        name = data.train.sets[int(data.train.source[index])].name
        asked, said = (TOKENIZER.decode(part) for part in (item["input_ids"][1:start], item["input_ids"][start:]))
        found.append((name, data.place(item["sample_ids"]), asked, said.removesuffix("</s>")))
    return found


def only(variant: str, **more) -> dict:
    return mixture(variants={variant: 1.0}, **more)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_draws_have_the_rates_of_both_levels():
    made = MixtureSettings.model_validate(mixture(), strict=False)
    rows = [24, 12, 6]
    parts = parts_of_tasks(made, rows)
    wanted = np.array([1 / 4, 3 / 4 * 8 / 14, 3 / 4 * 6 / 14])  # maths 1, general 3; in it min(8, 12) and min(8, 6)
    assert shares(parts, "rates") == pytest.approx(wanted, abs=1e-12)
    count = 100_000
    source, row = stream(parts, "rates", 7, count)
    drawn = np.bincount(source, minlength=3)
    sigma = np.sqrt(count * wanted * (1 - wanted))
    assert (np.abs(drawn - count * wanted) <= 3 * sigma).all()
    assert abs(drawn[1:].sum() - count * 3 / 4) <= 3 * np.sqrt(count * 3 / 16)
    assert len(source) == count  # the smallest task was exhausted thousands of times
    assert [sorted(set(row[source == number].tolist())) for number in range(3)] == [list(range(n)) for n in rows]
    assert epoch_rows(parts) == 24 + 8 + 6


def test_no_early_stop_when_a_task_is_exhausted(home):
    """Sets of 10 and 3 in equal shares: interleaving that stops with the first exhausted one gives 6 rows."""
    parts = [Part("a", "x", 10, 0.5), Part("b", "y", 3, 0.5)]
    source, _ = stream(parts, "rates", 0, 40)
    assert np.bincount(source).tolist() == [20, 20]


def test_the_paper_s_sub_mixtures():
    assert sum(one.tasks or 0 for one in PAPER.values()) == 1836
    sums = {preset: sum(one.rates.get(preset, 0) for one in PAPER.values()) for preset in PAPER["muffin"].rates}
    assert sums == pytest.approx({"flan2022": 99.9, "flan2022-a": 100, "flan2022-public": 100})
    made = mixture(preset="flan2022")
    for sub, name in zip(made["submixtures"], ("CoT", "t0-sf")):
        sub["name"] = name
        sub.pop("rate")
    preset = MixtureSettings.model_validate(made, strict=False)
    assert [preset.rate_of(sub) for sub in preset.submixtures] == [1.8, 27.9]
    assert [preset.cap_of(sub) for sub in preset.submixtures] == [100_000, 8]  # its own cap comes first
    assert preset.variants_of("sums") == Variants(zs_opt=0.5, fs_opt=0.5)
    assert set(preset.variants_of("picks").rates.values()) == {0.25}


def test_the_domain_is_the_sub_mixture_unless_the_task_has_one(home):
    data = loaded(task_settings(home, mixture(tasks={"wishes": {"domain": "code"}})), home)
    assert data.domains == ["maths", "general", "code"]
    names = {one.name: domain for one, domain in zip(data.train.sets, data.train.domains)}
    assert names == {"sums": 0, "picks": 1, "wishes": 2}
    assert [record["domain"] for record in data.counts["train"].values()] == data.domains


# --- how a row is shown ----------------------------------------------------------------------------------------------


def test_variants_have_their_rates(home):
    write_jsonl(home / "picks.jsonl", [{"question": f"{n}?", "answer": "red", "among": COLOURS} for n in range(2000)])
    rates = {"zs_opt": 1, "zs_noopt": 2, "fs_opt": 3, "fs_noopt": 4}
    data = loaded(task_settings(home, mixture(variants=rates)), home)
    told = data.counts["train"]["picks"]["variants"]
    assert sum(told.values()) == 2000
    for name, rate in rates.items():
        share = rate / 10
        assert abs(told[name] - 2000 * share) <= 3 * np.sqrt(2000 * share * (1 - share))
    assert "picks: zs_opt" in view_of(data, 1).as_text()


@pytest.mark.parametrize("variant", ["zs_opt", "zs_noopt", "fs_opt", "fs_noopt"])
def test_options_and_examples_as_the_variant_says(home, variant):
    rows = [row for row in texts(loaded(task_settings(home, only(variant)), home)) if row[0] == "picks"]
    marks = set()
    for _, place, asked, said in rows:
        number = int(place.split(":")[1]) - 1
        right = COLOURS[number % 4]
        assert f"pick {number}?" in asked
        assert (asked.count("pick ") > 1) == variant.startswith("fs")
        assert all(colour in asked for colour in COLOURS) or variant.endswith("noopt")
        if variant.endswith("noopt"):
            assert said == right and "ptions" not in asked and "\n\n\n\n" not in asked
        else:
            marks.add(next(m for m in ("- ", "* ", "(A) ", "A. ", "1. ", "1) ") if m + COLOURS[0] in asked))
            letter, index = "ABCD"[number % 4], str(number % 4 + 1)
            assert said in (right, letter, f"({letter})", f"({letter}) {right}", index)
    assert len(marks) >= 3 or variant.endswith("noopt")


def test_a_fixed_style(home):
    made = only("zs_opt", tasks={"picks": {"option_style": "letters"}})
    rows = [row for row in texts(loaded(task_settings(home, made), home)) if row[0] == "picks"]
    assert all("(B) green" in asked and said in ("(A)", "(B)", "(C)", "(D)") for _, _, asked, said in rows)


def test_worked_examples_are_other_rows_of_the_same_task_s_training_side(home):
    """With held-out rows, a limit, and one question asked by two rows with different answers."""
    rows = [{"question": f"q{n:02}?", "answer": f"a{n:02}"} for n in range(60)]
    rows += [{"question": "q01?", "answer": "other"}, {"question": "Q01? ", "answer": "third"}]
    write_jsonl(home / "sums.jsonl", rows)
    sides = {"heldout": 0.3, "columns": {"prompt": "question"}}
    change = {**sides, "part": "train", "templates": "open-qa", "limit": 30}
    held = (EvalSource(name="held", domain="d", path="sums.jsonl", part="heldout", **sides_of(sides)),)
    data = loaded(task_settings(home, only("fs_noopt", tasks={"sums": change}), eval=held), home, rows_needed=300)
    kept = {data.place(number) for number in range(len(data.train.sets[0]))}
    train = {rows[int(place.split(":")[1]) - 1]["question"] for place in kept}
    unseen = {row.prompt.strip() for row in data.eval["held"].rows}
    assert len(kept) == 30 and unseen and not unseen & train
    seen = 0
    for name, place, asked, _ in texts(data):
        if name != "sums":
            continue
        own = rows[int(place.split(":")[1]) - 1]["question"].strip().lower()
        told = re.findall(r"q\d\d\?", asked.lower())
        assert told[-1] == own and own not in told[:-1] and 1 <= len(told) - 1 <= 5
        assert len(set(told)) == len(told)
        assert set(told) <= {question.strip().lower() for question in train}
        seen += len(told) - 1
    assert seen > 100


def sides_of(sides: dict) -> dict:
    return {"heldout": sides["heldout"], "columns": {"prompt": "question", "completion": "answer"}}


def test_examples_are_left_out_until_the_input_fits(home):
    free = loaded(task_settings(home, only("fs_opt", fewshot_max=5)), home)
    tight = loaded(task_settings(home, only("fs_opt", fewshot_max=5, max_input=160)), home)
    limit = 160 - 10
    made = MixtureSettings.model_validate(only("fs_opt", max_input=160), strict=False)
    assert made.input_limit == limit
    assert MixtureSettings.model_validate(only("fs_opt"), strict=False).input_limit == 1920
    longest = max(len(TOKENIZER(asked)["input_ids"]) + 1 for _, _, asked, _ in texts(free))
    assert longest > limit
    few = 0
    for name, _, asked, _ in texts(tight):
        length, single = (
            len(TOKENIZER(asked)["input_ids"]) + 1,
            asked.count("sum ") + asked.count("pick ") + asked.count("wish ") == 1,
        )
        assert length <= limit or (single and length <= 160), (name, asked)
        few += not single
    assert few and tight.counts["train"]["sums"]["shots_pruned"] > 0
    assert free.counts["train"]["sums"]["shots"] > tight.counts["train"]["sums"]["shots"]


def test_limits_of_input_and_answer(home):
    rows = [{"question": "q" * n, "answer": "a" * m} for n, m in ((4, 4), (80, 4), (4, 30), (80, 30))]
    write_jsonl(home / "sums.jsonl", rows)
    made = only("zs_noopt", tasks={"sums": {"templates": "open-qa"}}, max_input=75, max_target=12)

    def counts(**more):
        record = loaded(task_settings(home, made, **more), home).counts["train"]["sums"]
        assert record["read"] == 4 == record["kept"] + record["over_long"] + record["all_masked"]
        return tuple(record[name] for name in ("kept", "over_long", "truncated", "all_masked"))

    assert counts() == (1, 3, 0, 0)
    assert counts(over_long="truncate") == (2, 0, 1, 2)
    with pytest.raises(DataError, match=r"sums\.jsonl:2: found an input of \d+ tokens; expected at most 75"):
        counts(over_long="stop")
    data = loaded(task_settings(home, made, over_long="truncate"), home)
    assert max(int((data.train[i]["labels"] >= 0).sum()) for i in range(84)) == 12


# --- the same rows everywhere ----------------------------------------------------------------------------------------


def same(one, two) -> bool:
    if len(one.train) != len(two.train):
        return False
    keys = ("input_ids", "labels", "domain", "position_ids")
    rows = range(len(one.train))
    return all(torch.equal(one.train[i][key], two.train[i][key]) for i in rows for key in keys)


def test_twins_and_cache_give_the_same_bytes(home, monkeypatch):
    first = loaded(task_settings(home), home)
    monkeypatch.setattr("sparsmith.data.prepare._encode", lambda *_: pytest.fail("encoded again"))
    assert same(first, loaded(task_settings(home), home))  # from the cache
    monkeypatch.undo()
    assert not same(first, loaded(task_settings(home), home, seed=2))


@pytest.mark.long
def test_workers_in_another_folder_give_the_same_bytes(home, monkeypatch):
    other = home / "other"
    other.mkdir()
    write_tasks(other)
    monkeypatch.setattr("sparsmith.data.workers.PARALLEL_FROM", 1)
    assert same(loaded(task_settings(home), home), loaded(task_settings(other, workers=2), other))


def test_a_row_s_rendering_is_its_own(home):
    """Rows that come before it, and the tasks beside it, change nothing of a row without worked examples."""
    made = mixture(variants={"zs_opt": 1, "zs_noopt": 1})
    before = {
        (name, asked, said) for name, _, asked, said in texts(loaded(task_settings(home, made), home, rows_needed=120))
    }
    lines = (home / "sums.jsonl").read_text()
    (home / "sums.jsonl").write_text('{"question": "new?", "answer": "1", "rationale": "So."}\n' + lines)
    made["submixtures"] = made["submixtures"][:1]
    after = texts(loaded(task_settings(home, made), home, rows_needed=25))
    kept = {(name, asked, said) for name, _, asked, said in after if "new?" not in asked}
    assert len(kept) == 24 and kept <= before


@pytest.mark.parametrize("cut", [0, 1, 7, 40, 83])
def test_a_resume_at_any_step_sees_the_same_rows(home, cut):
    whole = loaded(task_settings(home), home)
    again = loaded(task_settings(home), home, rows_needed=84 + 20)  # a longer run begins with the shorter one's rows
    rest = torch.utils.data.Subset(again.train, range(cut, 84))
    loader = torch.utils.data.DataLoader(rest, 4, collate_fn=again.collator())
    wanted = torch.utils.data.DataLoader(
        torch.utils.data.Subset(whole.train, range(cut, 84)), 4, collate_fn=whole.collator()
    )
    batches = list(zip(loader, wanted, strict=True))
    assert batches
    assert all(torch.equal(one[key], two[key]) for one, two in batches for key in one)


def test_the_cache_knows_what_changes_rows(home):
    def entries() -> int:
        return len(list((home / "cache").iterdir()))

    (home / "own.yaml").write_text('patterns: [{input: "{question}", target: "{answer}"}]')
    own = {"sums": {"templates": "own.yaml"}}
    loaded(task_settings(home, mixture(tasks=own)), home)
    assert entries() == 3
    (home / "own.yaml").write_text('patterns: [{input: "{question}!", target: "{answer}"}]')
    data = loaded(task_settings(home, mixture(tasks=own)), home)
    assert entries() == 4 and all(asked.count("?!") for name, _, asked, _ in texts(data) if name == "sums")
    loaded(task_settings(home, mixture(tasks=own, variants={"zs_opt": 1})), home)
    assert entries() == 7
    loaded(task_settings(home, mixture(tasks=own, fewshot_max=2)), home)
    assert entries() == 10
    loaded(task_settings(home, mixture(tasks=own)), home, seed=5)
    assert entries() == 13
    loaded(task_settings(home, mixture(tasks=own)), home)
    assert entries() == 13


# --- only the answer is learned --------------------------------------------------------------------------------------


def test_labels_of_the_input_change_nothing(home):
    """The loss is that of the answer's tokens and the eos, whatever stands as a label elsewhere."""
    from tests.kit.pico import pico_model

    data, model = loaded(task_settings(home), home), pico_model("llama").eval()
    for index in range(6):
        item = data.train[index]
        ids, labels = item["input_ids"][None], item["labels"][None]
        start = int((labels[0] >= 0).nonzero()[0])
        assert (labels[0, :start] == -100).all() and (labels[0, start:] == ids[0, start:]).all()
        assert ids[0, -1] == TOKENIZER.eos_token_id
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels, use_cache=False)
            seen = model(input_ids=ids, labels=ids, use_cache=False).loss
        hand = torch.stack([-out.logits[0, p - 1].log_softmax(-1)[ids[0, p]] for p in range(start, ids.shape[1])])
        assert float(out.loss) == pytest.approx(float(hand.mean()), abs=1e-5)
        assert abs(float(seen) - float(out.loss)) > 1e-4  # labels of the input would have been seen


# --- bad rows and bad settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": "1", "rationale": "r"}, r"sums\.jsonl:25:question: found no field `question`"),
        ({"question": "q?", "rationale": "r"}, r"sums\.jsonl:25:answer: found no field `answer`"),
        ({"question": "", "answer": "1", "rationale": "r"}, "an empty the field `question`|an empty"),
        ({"question": "q?", "answer": 1, "rationale": "r"}, r"sums\.jsonl:25:answer: found the number 1"),
        ({"question": None, "answer": "1", "rationale": "r"}, r"sums\.jsonl:25:question: found null"),
    ],
)
def test_a_missing_field_names_its_row(home, row, told):
    with (home / "sums.jsonl").open("a") as out:
        out.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=told):
        loaded(task_settings(home), home)
    data = loaded(task_settings(home, on_bad_row="skip"), home)
    assert [bad.line for bad in data.rejects["sums"]] == [25]


def test_an_answer_that_is_no_option_names_its_row(home):
    with (home / "picks.jsonl").open("a") as out:
        out.write(json.dumps({"question": "q?", "answer": "pink", "among": COLOURS}) + "\n")
    with pytest.raises(DataError, match=r"picks\.jsonl:13:answer: found the text 'pink' as the answer, none of 4"):
        loaded(task_settings(home), home)


def test_braces_in_rows_are_text(home):
    write_jsonl(home / "sums.jsonl", [{"question": "{answer} {0.__class__} {{x}}", "answer": "{question}"}] * 2)
    made = only("zs_noopt", tasks={"sums": {"templates": "open-qa"}})
    rows = [row for row in texts(loaded(task_settings(home, made), home)) if row[0] == "sums"]
    assert rows and all(asked.count("answer") and said.strip() for _, _, asked, said in rows)
    rendering = Rendering.of(
        MixtureSettings.model_validate(made, strict=False),
        task_settings(home, made).sources[0],  # type: ignore[arg-type]
        home,
        64,
        0,
    )
    from sparsmith.data.fields import TaskRow

    row = TaskRow({"question": "{answer} {0.__class__} {{x}}", "answer": "{question}"}, 5)
    plan = rendering.draw(0, [row])
    question, answer = rendering.pair(plan, row)
    assert "{answer} {0.__class__} {{x}}" in question and answer == "{question}"


@pytest.mark.parametrize(
    ("options", "answer", "texts_", "right"),
    [
        (["A)21", "B)3.5"], "B", ("21", "3.5"), 1),
        (["(A) 30", "(B) 34"], "(A)", ("30", "34"), 0),
        (["A: x", "B: y"], "B", ("x", "y"), 1),
        (["Sentence A: he", "Sentence B: she"], "Sentence B", ("Sentence A: he", "Sentence B: she"), 1),
        (["yes", "no"], "no", ("yes", "no"), 1),
        (["no", "yes"], 1, ("no", "yes"), 1),
        (["true", "false"], False, ("true", "false"), 1),
        (["C) x", "D) y"], "C) x", ("C) x", "D) y"), 0),
    ],
)
def test_options_are_read_without_their_marks(options, answer, texts_, right):
    found = choices_of(options, answer)
    assert (found.texts, found.right) == (texts_, right)


@pytest.mark.parametrize("answer", ["z", 2, -1, None, 1.5, ["a"], ""])
def test_no_option_is_a_fault(answer):
    with pytest.raises(RowFault, match="as the answer"):
        choices_of(["a", "b"], answer)


SHARED = Path(__file__).parents[4] / "shared/data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository")
def test_the_documented_mixture_reads_public_files(tmp_path):
    import yaml

    text = (Path(__file__).parents[3] / "docs/mixtures.md").read_text(encoding="utf-8")
    made = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["data"]
    for sub in made["mixture"]["submixtures"]:
        for task in sub["tasks"]:
            task |= {"path": task["path"].replace("../../shared/data/", ""), "limit": 15}
    settings = task_settings(tmp_path, made["mixture"], max_length=2000)
    data = load_data(settings, TOKENIZER, seed=1, base_dir=SHARED, rows_needed=60)
    assert len(data.counts["train"]) == 17 and all(record["kept"] for record in data.counts["train"].values())
    assert data.domains == ["maths", "code", "general"]
    assert sum(record["share"] for record in data.counts["train"].values()) == pytest.approx(1)
