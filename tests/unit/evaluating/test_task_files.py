"""Task files and their rows, without the harness."""

from __future__ import annotations

import math

import pytest

from sparsmith.errors import DataError, RecipeErrors, UsageError
from sparsmith.evaluating.harness.rows import find_file, read_task_rows
from sparsmith.evaluating.harness.scores import Item, Share, TaskResult, TaskScores
from sparsmith.evaluating.harness.task_files import BUILT_IN, built_in_tasks, find_tasks, read_task
from sparsmith.evaluating.harness.templates import PLACE, answer_of, options_of, render, target_of, text_of
from tests.kit.taskfiles import CHOOSE, WRITE, colours, write_rows, write_task

ROW = {PLACE: "rows.jsonl:3", "q": "which?", "a": "red", "n": 2, "o": ["red", "blue"]}


def question(row):
    return row["q"]


def test_every_task_that_ships_is_good_and_takes_its_shots_from_another_file():
    names = built_in_tasks()
    assert {"boolq", "arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "mmlu", "mmlu_cot"} <= set(names)
    assert {"webquestions", "gsm8k", "svamp"} <= set(names)
    for task in find_tasks(names):
        assert task.name == task.path.stem
        scored, shots = task.config["test_split"], task.config["fewshot_split"]
        assert task.files[scored] != task.files[shots]
        if task.files[shots].endswith("_shots.jsonl"):
            assert (BUILT_IN / task.files[shots]).is_file()
    by_name = {task.name: task for task in find_tasks(names)}
    assert {n for n, task in by_name.items() if task.shots} == {"mmlu", "mmlu_cot", "gsm8k", "svamp"}
    assert all(task.shots in (0, 5) for task in by_name.values())
    assert by_name["mmlu"].files[by_name["mmlu"].config["fewshot_split"]] == "mmlu_dev.jsonl"


@pytest.mark.parametrize(
    ("base", "changes", "where", "words"),
    [
        (CHOOSE, {"fewshot_split": None}, "", "no `fewshot_split`"),
        (CHOOSE, {"fewshot_split": "test"}, "fewshot_split", "the rows that are scored"),
        (
            CHOOSE,
            {"dataset_kwargs": {"data_files": {"train": "x.jsonl", "test": "x.jsonl"}}},
            "fewshot_split",
            "the rows that are scored",
        ),
        (CHOOSE, {"fewshot_split": "tran"}, "fewshot_split", "Did you mean `train`?"),
        (CHOOSE, {"doc_to_txt": "x"}, "doc_to_txt", "Did you mean `doc_to_text`?"),
        (CHOOSE, {"process_docs": "x.y"}, "process_docs", "code is never taken"),
        (CHOOSE, {"dataset_path": "super_glue"}, "dataset_path", "local files"),
        (CHOOSE, {"doc_to_text": "{{q"}, "doc_to_text", "a template with a fault"),
        (CHOOSE, {"doc_to_choice": None}, "", "no `doc_to_choice`"),
        (CHOOSE, {"doc_to_choice": [True, False]}, "doc_to_choice", "two texts or more"),
        (CHOOSE, {"num_fewshot": -1}, "num_fewshot", "0 or more"),
        (CHOOSE, {"num_fewshot": True}, "num_fewshot", "a whole number"),
        (CHOOSE, {"generation_kwargs": {"until": ["x"]}}, "generation_kwargs", "without effect"),
        (CHOOSE, {"metric_list": [{"metric": "bleu"}]}, "metric_list.0", "acc_norm"),
        (CHOOSE, {"metric_list": [{"metric": "acc", "ignore_case": True}]}, "metric_list.0.ignore_case", "effect"),
        (CHOOSE, {"metadata": {"chance": 0.5}}, "metadata.chance", "without effect"),
        (CHOOSE, {"fewshot_config": {"sampler": "best"}}, "fewshot_config.sampler", "first_n"),
        (CHOOSE, {"description": "{{q}}"}, "description", "plain text"),
        (WRITE, {"generation_kwargs": {"max_gen_toks": 4}}, "generation_kwargs", "no texts to stop at"),
        (WRITE, {"generation_kwargs": {"until": ["\n"]}}, "generation_kwargs", "no length"),
        (WRITE, {"doc_to_choice": ["a", "b"]}, "doc_to_choice", "without effect"),
        (
            WRITE,
            {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": True}},
            "generation_kwargs.do_sample",
            "likeliest",
        ),
        (WRITE, {"filter_list": [{"name": "x", "filter": [{"function": "map"}]}]}, "filter_list.0", "take_first"),
        (WRITE, {"metadata": {"chance": 1.0}}, "metadata.chance", "below 1"),
    ],
)
def test_a_bad_task_file_names_file_line_and_key(tmp_path, base, changes, where, words):
    path = write_task(tmp_path, base, **changes)
    with pytest.raises(RecipeErrors) as caught:
        read_task(path)
    fault = caught.value.faults[0]
    assert fault.where.startswith(f"{path}:") and fault.where.endswith(where) and words in str(fault)


def test_all_faults_at_once_and_no_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("task: evil\nprocess_results: !function os.system\nx: 1\n", encoding="utf-8")
    with pytest.raises(RecipeErrors, match="!function"):
        read_task(path)
    with pytest.raises(RecipeErrors) as caught:
        read_task(write_task(tmp_path, CHOOSE, x=1, y=2, doc_to_text=None))
    assert len(caught.value.faults) == 3


def test_names_paths_and_folders(tmp_path):
    colours(tmp_path)
    write_task(tmp_path, WRITE)
    assert [task.name for task in find_tasks([str(tmp_path), "boolq"])] == ["colours", "letters", "boolq"]
    assert [task.name for task in find_tasks([str(tmp_path / "letters.yaml")])] == ["letters"]
    for wanted, words in (
        (["boolk"], "Did you mean `boolq`"),
        (["boolq", "boolq"], "twice"),
        ([], "no task"),
        ([""], "``"),
    ):
        with pytest.raises(UsageError, match=words):
            find_tasks(wanted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="without task files"):
        find_tasks([str(tmp_path / "empty")])


def test_templates_are_sandboxed_and_their_faults_name_the_row():
    assert render("q", ROW, "t") == "which?"
    assert text_of("{{q}} {{n + 1}}", "t")(ROW) == "which? 3"
    bad = ["{{q.__class__.__mro__}}", "{{missing}}", "{{n / 0}}", "{{'x'|attr('__class__')}}", "{{o.append('x')}}"]
    for text in bad:
        with pytest.raises(DataError, match=r"rows\.jsonl:3: t: "):
            text_of(text, "t")(ROW)
    assert ROW["o"] == ["red", "blue"]
    for value in ("", "n", "o"):
        with pytest.raises(DataError):
            text_of(value, "t")(ROW)


def test_options_and_answers():
    options = options_of("{{o}}", "c")
    assert options(ROW) == options_of("o", "c")(ROW) == ["red", "blue"]
    assert answer_of("a", options, "t")(ROW) == 0
    assert answer_of("{{n - 1}}", options, "t")(ROW) == answer_of("1", options, "t")(ROW) == 1
    for text in ("q", "n", "{{n}}", "{{0 - 1}}"):
        with pytest.raises(DataError, match="one of"):
            answer_of(text, options, "t")(ROW)
    for text in ("a", "{{['x']}}", "{{[1, 2]}}", "{{['x', 'x']}}", "n"):
        with pytest.raises(DataError):
            options_of(text, "c")(ROW)
    assert target_of("n", "t")(ROW) == "2" and target_of("o", "t")(ROW) == ["red", "blue"]
    with pytest.raises(DataError):
        target_of("{{' '}}", "t")(ROW)


def test_the_pool_is_another_file_and_rows_that_are_scored_are_taken_out_of_it(tmp_path):
    task = read_task(colours(tmp_path))
    options = {"prompt": question, "shot_prompt": question}
    write_rows(
        tmp_path, "colours_train", [{"q": f"train {n}", "a": "red"} for n in range(3)] + [{"q": "test 1", "a": "x"}]
    )
    (rows,) = read_task_rows(task, None, shots=2, limit=2, **options)
    assert len(rows.scored) == 2 and [row["q"] for row in rows.pool] == ["train 0", "train 1", "train 2"]
    assert rows.removed == 1, "a row beyond `limit` is a test row too"
    assert list(rows.scored.features) == ["q", "a", PLACE]
    assert [one.shots for one in read_task_rows(task, None, shots=4, limit=None, **options)] == [3]
    with pytest.raises(UsageError, match=r"3 rows to draw 5 shots from \(1 left out"):
        read_task_rows(task, None, shots=5, limit=None, **options)
    (tmp_path / "colours_train.jsonl").unlink()
    (rows,) = read_task_rows(task, None, shots=0, limit=None, **options)
    assert not rows.pool and len(rows.scored) == 6
    with pytest.raises(UsageError, match="no data folder"):
        read_task_rows(task, None, shots=1, limit=None, **options)
    (tmp_path / "colours_train.jsonl").symlink_to(tmp_path / "colours_test.jsonl")
    with pytest.raises(UsageError, match="the file that is scored"):
        read_task_rows(task, None, shots=1, limit=None, **options)


def test_files_are_found_in_the_folder_below_it_or_beside_the_task(tmp_path):
    own = tmp_path / "tasks"
    own.mkdir()
    task = read_task(colours(own))
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (data / "b").mkdir()
    assert find_file(task, "test", data) == own / "colours_test.jsonl"
    below = write_rows(data / "a", "colours_test", [{"q": "x", "a": "red"}])
    assert find_file(task, "test", data) == below
    (data / "b" / "colours_test.jsonl.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="twice"):
        find_file(task, "test", data)
    here = write_rows(data, "colours_test", [{"q": "x", "a": "red"}])
    assert find_file(task, "test", data) == here


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    task = read_task(colours(tmp_path))
    (tmp_path / "colours_test.jsonl").write_text('{"q": "x", "a": "red"}\n{broken\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"colours_test\.jsonl:2"):
        read_task_rows(task, None, shots=0, limit=None, prompt=question, shot_prompt=question)


def test_one_task_for_each_subject_with_shots_of_its_own(tmp_path):
    task = read_task(colours(tmp_path, metadata={"by": "s"}))
    write_rows(
        tmp_path, "colours_test", [{"q": f"t{n}", "a": "red", "s": "Sky Blue" if n < 2 else "x"} for n in range(5)]
    )
    write_rows(
        tmp_path, "colours_train", [{"q": f"p{n}", "a": "red", "s": "Sky Blue" if n < 3 else "x"} for n in range(5)]
    )
    options = {"prompt": question, "shot_prompt": question}
    sky, x = read_task_rows(task, None, shots=2, limit=None, **options)
    assert (sky.name, sky.group, x.name) == ("colours_sky_blue", "colours", "colours_x")
    assert [row["q"] for row in sky.pool] == ["p0", "p1", "p2"] and [row["q"] for row in x.scored] == ["t2", "t3", "t4"]
    with pytest.raises(UsageError, match="colours_x"):
        read_task_rows(task, None, shots=3, limit=None, **options)
    write_rows(tmp_path, "colours_train", [{"q": f"p{n}", "a": "red"} for n in range(5)])
    assert [len(one.pool) for one in read_task_rows(task, None, shots=3, limit=None, **options)] == [5, 5]
    write_rows(tmp_path, "colours_test", [{"q": "t", "a": "red", "s": 3}])
    with pytest.raises(DataError, match=r"colours_test\.jsonl:1: s"):
        read_task_rows(task, None, shots=0, limit=None, **options)


def scores(name, hits, group=None, chance=0.5):
    return TaskScores(name, group or name, chance, 0, tuple(Item(f"f:{n}", {"acc": hit}) for n, hit in enumerate(hits)))


def test_shares_errors_and_normalised_scores():
    share = Share.of([1.0, 0.0, 1.0, 1.0])
    assert share.value == 0.75 and math.isclose(share.stderr, math.sqrt(0.75 * 0.25 * 4 / 3 / 4))
    assert Share.of([1.0]).stderr is None
    assert math.isclose(Share(0.55, None, 1).normalised(0.5), 10) and math.isclose(
        Share(0.45, None, 1).normalised(0.5), -10
    )


def test_subjects_are_pooled_by_items_and_results_are_paired():
    made = TaskResult(
        (scores("m_a", [1.0, 1.0, 0.0], "m", 0.25), scores("m_b", [0.0], "m", 0.5)), "0", "rank", 1, None, 0.0
    )
    (pooled,) = made.groups.values()
    assert pooled.share("acc").value == 0.5 and math.isclose(pooled.chance, (3 * 0.25 + 0.5) / 4)
    assert [row[:3] for row in made.sheet().rows] == [("m", "acc", "4")]
    assert [row[0] for row in made.sheet(subjects=True).rows] == ["m_a", "m_b"]
    other = TaskResult((scores("m_a", [0.0, 0.0, 0.0], "m"), scores("m_c", [0.0], "m")), "0", "rank", 1, None, 0.0)
    assert made.minus(other).sets["m_a"]["acc"].value == pytest.approx(2 / 3) and list(made.minus(other).sets) == [
        "m_a"
    ]
    data = made.to_json()
    assert data["groups"]["m"]["n"] == 4 and len(data["tasks"]["m_a"]["items"]) == 3
