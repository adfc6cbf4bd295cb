"""Tasks of the harness on a model in memory: figures, shots, what it leaves alone, and our rank classifier on the same items."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import socket
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sparsmith as sm
from sparsmith.cli import main
from sparsmith.errors import DataError, EnvironmentFault, ProofError, UsageError
from sparsmith.evaluating import evaluate_tasks, rank_classification
from sparsmith.evaluating.rank import TIE
from tests.kit.checkpoints import save_base
from tests.kit.evalsets import char_tokenizer
from tests.kit.pico import FAMILIES, pico_model
from tests.kit.taskfiles import CHOOSE, WRITE, colours, write_rows, write_task

pytestmark = pytest.mark.skipif(
    not any(d.metadata["Name"].replace("-", "_") == "lm_eval" for d in metadata.distributions()),
    reason="lm_eval is not installed: pip install 'sparsmith[eval]'",
)
DATA = Path(__file__).parents[4] / "shared" / "data"
real_rows = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")
TOKENIZER = char_tokenizer()


@pytest.fixture
def told(monkeypatch):
    """What the harness's own `evaluate` returned."""
    import lm_eval.evaluator

    kept: dict = {}
    whole = lm_eval.evaluator.evaluate

    def listening(*args, **options):
        kept.update(whole(*args, **options))
        return kept

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", listening)
    return kept


@pytest.mark.parametrize("scorer", ["harness", "rank"])
def test_figures_are_the_harness_own(tmp_path, told, scorer):
    path = colours(tmp_path, scored=7)
    found = evaluate_tasks(pico_model(), TOKENIZER, [str(path)], scorer=scorer, batch_size=3)
    (task,) = found.tasks
    for metric in ("acc", "acc_norm", "acc_bytes"):
        share = task.share(metric)
        assert share.value == pytest.approx(told["results"]["colours"][f"{metric},none"], abs=1e-12)
        assert share.stderr == pytest.approx(told["results"]["colours"][f"{metric}_stderr,none"], abs=1e-12)
    assert (task.chance, task.shots, len(task.items), found.version) == (0.5, 0, 7, metadata.version("lm_eval"))
    assert [item.place for item in task.items] == [f"{tmp_path}/colours_test.jsonl:{n + 1}" for n in range(7)]


def naive(model, prompt, options):
    """Summed log-likelihood of each option, one forward each, without padding or cache."""
    sums = []
    for option in options:
        head, whole = ([1, *TOKENIZER.encode(text, add_special_tokens=False)] for text in (prompt, prompt + option))
        with torch.no_grad():
            logp = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        sums.append(sum(logp[at - 1, whole[at]].item() for at in range(len(head), len(whole))))
    return sums


@pytest.mark.parametrize("scorer", ["harness", "rank"])
def test_scores_are_those_of_the_naive_sum_with_one_bos(tmp_path, scorer):
    model = pico_model()
    (task,) = evaluate_tasks(model, TOKENIZER, [str(colours(tmp_path))], scorer=scorer).tasks
    for number, item in enumerate(task.items):
        wanted = naive(model, f"Q: test {number}\nA:", [" red", " blue"])
        assert item.scores == pytest.approx(wanted, abs=1e-4)
        assert item.hits["acc"] == float((wanted[0] < wanted[1]) == (number % 2 == 1))
        by_letter = wanted[0] / 3 < wanted[1] / 4
        assert item.hits["acc_norm"] == item.hits["acc_bytes"] == float(by_letter == (number % 2 == 1))


def shots_of(told, name):
    """The questions that stand before the asked one, of every prompt."""
    prompts = [sample["arguments"][0][0] for sample in told["samples"][name]]
    return [part.split("\n")[0].removeprefix("Q: ") for prompt in prompts for part in prompt.split("\n\n")[:-1]]


def test_shots_never_come_from_the_test_file(tmp_path, told):
    path = colours(tmp_path, scored=12, pool=5)
    pool = [{"q": f"train {n}", "a": "red"} for n in range(5)] + [{"q": f"test {n}", "a": "red"} for n in range(12)]
    write_rows(tmp_path, "colours_train", pool)
    seen = set()
    for seed in range(5):
        (task,) = evaluate_tasks(
            pico_model(max_position_embeddings=512), TOKENIZER, [str(path)], shots=3, seed=seed
        ).tasks
        asked = shots_of(told, "colours")
        assert len(asked) == 3 * 12 and task.shots == 3 and task.removed == 12
        seen |= set(asked)
    assert seen == {f"train {n}" for n in range(5)}


def test_a_pool_that_holds_scored_rows_gives_fewer_shots_and_says_so(tmp_path, told):
    path = colours(tmp_path, pool=0)
    write_rows(tmp_path, "colours_train", [{"q": q, "a": "red"} for q in ("test 1", "train 1", "test 2", "train 2")])
    found = evaluate_tasks(pico_model(), TOKENIZER, str(path), shots=4)
    assert (found.tasks[0].shots, found.tasks[0].removed) == (2, 2) and set(shots_of(told, "colours")) == {
        "train 1",
        "train 2",
    }
    assert "2 rows were kept out of the shots" in found.sheet().caption


def test_the_trial_above_can_see_a_leak(tmp_path):
    """The same task as the harness takes it without `fewshot_split`: its shots are scored rows."""
    from lm_eval.api.task import ConfigurableTask

    from sparsmith.evaluating.harness.rows import Rows

    rows = Rows({"q": f"test {n}", "a": "red"} for n in range(12))
    kept = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target")
    config = {key: CHOOSE[key] for key in kept} | {"task": "colours", "test_split": "test", "num_fewshot": 3}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: {"test": rows}})
    task.set_fewshot_seed(0)
    assert "Q: test" in task.fewshot_context(rows[0], num_fewshot=3).rpartition("\n\n")[0]


def test_the_first_shots_of_first_n_and_other_words_in_shots(tmp_path, told):
    path = colours(tmp_path, fewshot_config={"sampler": "first_n", "doc_to_target": "{{a}}!"}, num_fewshot=2)
    evaluate_tasks(pico_model(), TOKENIZER, [str(path)], limit=2)
    for sample in told["samples"]["colours"]:
        assert sample["arguments"][0][0].startswith("Q: train 0\nA: red!\n\nQ: train 1\nA: blue!\n\nQ: test ")


def test_written_answers_are_greedy_and_cut_at_the_stop(tmp_path, told):
    """Against the argmax of one forward per token; the checkpoint's generation settings are of no effect."""
    path = write_task(tmp_path, WRITE)
    model = pico_model()
    rows = [{"q": q, "a": ["x", "y"]} for q in ("a", "bb", "ccc")]
    wanted = []
    for row in rows:
        ids = [1, *TOKENIZER.encode(f"after {row['q']} comes", add_special_tokens=False)]
        start = len(ids)
        while len(ids) < start + 4 and ids[-1] != 2:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        wanted.append(TOKENIZER.decode(ids[start:], skip_special_tokens=True).split("\n")[0])
    assert any(wanted)
    rows[0]["a"] = [wanted[0], "other"]
    write_rows(tmp_path, "letters_test", rows)
    model.generation_config.repetition_penalty, model.generation_config.min_length = 50.0, 40
    before = model.generation_config
    (task,) = evaluate_tasks(model, TOKENIZER, [str(path)]).tasks
    assert [item.answer for item in task.items] == wanted and model.generation_config is before
    assert [item.hits["exact_match"] for item in task.items] == [1.0, 0.0, 0.0]
    assert told["results"]["letters"]["exact_match,none"] == pytest.approx(1 / 3)


def test_the_last_number_after_the_answer_is(tmp_path, monkeypatch):
    """The filters of gsm8k and svamp on texts that a model might write."""
    from sparsmith.evaluating.harness.scoring import HarnessModel

    texts = ["So 3. The answer is 1,250.", "The answer is 7. No: the answer is $12.00", "The answer is -4.5 m", "12"]
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests: texts)
    for name, answers in (("gsm8k", ["1250", "12", "-4.5", "12"]), ("svamp", [1250, 12.0, -4.5, 12])):
        if name == "gsm8k":
            rows = [{"question": f"q{n}", "answer": f"so <<1+1=2>>2\n#### {a}"} for n, a in enumerate(answers)]
        else:
            rows = [{"Body": f"b{n}", "Question": "q?", "Answer": a} for n, a in enumerate(answers)]
        write_rows(tmp_path, f"{name}_test", rows)
        model = pico_model(max_position_embeddings=512)
        (task,) = evaluate_tasks(model, TOKENIZER, [name], data=tmp_path, shots=0).tasks
        assert [item.hits["exact_match"] for item in task.items] == [1.0, 1.0, 1.0, 0.0]
        assert [item.answer for item in task.items][:2] == ["1,250", "12.00"]


def test_nothing_is_changed_printed_or_fetched(tmp_path, monkeypatch, capsys):
    def no_network(*args, **options):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    colours(tmp_path)
    write_task(tmp_path, WRITE)
    write_rows(tmp_path, "letters_test", [{"q": "a", "a": "b"}])
    model, tokenizer = pico_model(), char_tokenizer()
    tokenizer.pad_token = None
    model.lm_head.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words, random_state, torch_state = (
        copy.deepcopy(tokenizer.special_tokens_map),
        random.getstate(),
        torch.get_rng_state(),
    )
    level = logging.getLogger("lm_eval").level
    sm.evaluate_tasks(model, tokenizer, [str(tmp_path)], shots=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert tokenizer.special_tokens_map == words and tokenizer.pad_token is None
    assert model.lm_head.training and not model.model.training
    assert random.getstate() == random_state and torch.equal(torch.get_rng_state(), torch_state)
    assert logging.getLogger("lm_eval").level == level
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("scorer", ["harness", "rank"])
def test_a_prompt_that_does_not_fit_is_counted(tmp_path, scorer):
    path = colours(tmp_path)
    write_rows(tmp_path, "colours_test", [{"q": "x" * 200, "a": "red"}, {"q": "y", "a": "red"}])
    (task,) = evaluate_tasks(pico_model(), TOKENIZER, [str(path)], scorer=scorer).tasks
    assert task.cut == 1 and all(math.isfinite(score) for item in task.items for score in item.scores)


def test_faults_are_ours(tmp_path, monkeypatch):
    model, path = pico_model(), str(colours(tmp_path))
    for options, words in (
        ({"limit": 0}, "limit"),
        ({"shots": -1}, "shots"),
        ({"shots": 9}, "8 rows to draw 9 shots"),
        ({"data": tmp_path / "none"}, "no folder"),
    ):
        with pytest.raises(UsageError, match=words):
            evaluate_tasks(model, TOKENIZER, [path], **options)
    long = {"until": ["\n"], "max_gen_toks": 128}
    write_rows(tmp_path, "letters_test", [{"q": "a", "a": "b"}])
    with pytest.raises(UsageError, match="context of 128"):
        evaluate_tasks(model, TOKENIZER, [str(write_task(tmp_path, WRITE, generation_kwargs=long))])
    spoilt = pico_model()
    torch.nn.init.constant_(spoilt.lm_head.weight, float("nan"))
    with pytest.raises(ProofError, match=r"colours .*colours_test\.jsonl:1"):
        evaluate_tasks(spoilt, TOKENIZER, [path])
    write_rows(tmp_path, "colours_test", [{"q": "x", "a": "red"}, {"q": "x", "a": "green"}])
    with pytest.raises(DataError, match=r"colours_test\.jsonl:2: doc_to_target"):
        evaluate_tasks(model, TOKENIZER, [path])
    import lm_eval.evaluator

    colours(tmp_path)
    monkeypatch.setattr(lm_eval.evaluator, "evaluate", lambda *args, **options: {}["samples"])
    with pytest.raises(EnvironmentFault, match=r"lm_eval .*KeyError"):
        evaluate_tasks(model, TOKENIZER, [path])


@pytest.mark.parametrize("version", [None, "0.4.9"])
def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch, capsys, version):
    from sparsmith.evaluating.harness import running

    def missing(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(running.metadata, "version", missing)
    assert main(["eval", "no-such-model", "--tasks", str(colours(tmp_path))]) == 9
    assert "pip install 'sparsmith[eval]'" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    save_base(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    path = colours(tmp_path, num_fewshot=1)
    capsys.readouterr()
    arguments = ["eval", str(tmp_path / "base"), "--tasks", str(path), "--tasks-data", str(tmp_path), "--limit", "3"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["groups"]["colours"]["n"] == 3 and document["groups"]["colours"]["shots"] == 1
    assert document["scorer"] == "harness" and document["limit"] == 3
    assert main([*arguments, "--shots", "0", "--scorer", "rank"]) == 0
    out = capsys.readouterr().out
    assert "colours" in out and "acc_norm" in out and "50.00 %" in out and "our rank classifier" in out


def test_crafted_models(tmp_path):
    """Neutral crafts score and write as their base does."""
    colours(tmp_path)
    write_task(tmp_path, WRITE)
    write_rows(tmp_path, "letters_test", [{"q": "a", "a": "b"}, {"q": "bcd", "a": "b"}])
    base = pico_model()
    wanted = evaluate_tasks(base, TOKENIZER, [str(tmp_path)]).tasks
    for config in (sm.PescConfig(num_experts=2, top_k=1, adapter_dim=8), sm.SoftConfig(exits=[1, 2])):
        for found, task in zip(
            evaluate_tasks(sm.craft(base, config), TOKENIZER, [str(tmp_path)]).tasks, wanted, strict=True
        ):
            assert [item.answer for item in found.items] == [item.answer for item in task.items]
            for item, other in zip(found.items, task.items, strict=True):
                assert item.scores == pytest.approx(other.scores, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    path, model = str(colours(tmp_path)), pico_model(family)
    first, second = (
        evaluate_tasks(model, TOKENIZER, path, limit=2, scorer=one).tasks[0] for one in ("harness", "rank")
    )
    for item, other in zip(first.items, second.items, strict=True):
        assert item.scores == pytest.approx(other.scores, abs=1e-4) and item.hits == other.hits


TASKS = {
    "boolq": ("eval/boolq_test.jsonl.gz", "instruction", "answer", ("true", "false")),
    "arc_easy": ("eval/ARC-Easy_test.jsonl.gz", "instruction", "answer", "instruction"),
    "winogrande": ("eval/winogrande_test.jsonl.gz", "instruction", "answer", "instruction"),
    "mmlu_texts": ("eval/mmlu_test.jsonl.gz", "question", "answer", "choices"),
}
"""Name -> file, prompt, answer, options as a recipe writes them."""


@real_rows
@pytest.mark.parametrize("name", TASKS)
def test_harness_and_rank_classifier_agree_item_by_item(name, tmp_path):
    """Same rows, prompts and options: the task through the harness, the task scored by our classifier, and the recipe's own rank set."""
    from sparsmith.data.chat import make_encoder
    from sparsmith.data.evalsets import load_eval
    from sparsmith.evaluating.rank import _tokens, score_options
    from sparsmith.recipe.schema import DataSettings, EvalSource, TrainSource

    file, prompt, answer, options = TASKS[name]
    limit, model = 10 if options == "choices" else 20, pico_model(max_position_embeddings=2048, seed=3)
    task = {
        **CHOOSE,
        "task": name,
        "dataset_kwargs": {"data_files": {"test": Path(file).name, "none": "none.jsonl"}},
        "fewshot_split": "none",
        "doc_to_text": "{{" + prompt + "}}\nAnswer:",
        "doc_to_choice": list(options)
        if isinstance(options, tuple)
        else ("choices" if options == "choices" else "{{instruction.split('Answer format: ')[-1].split('/')}}"),
        "doc_to_target": answer,
        "target_delimiter": "",
    }
    path = str(write_task(tmp_path, task))
    (theirs,) = evaluate_tasks(model, TOKENIZER, [path], data=DATA, limit=limit).tasks
    (ours,) = evaluate_tasks(model, TOKENIZER, [path], data=DATA, limit=limit, scorer="rank").tasks
    settings = DataSettings(
        train=(TrainSource(name="t", domain="d", path="t"),), template="{prompt}\nAnswer:", max_length=2048
    )
    columns = {"prompt": prompt, "completion": answer}
    source = EvalSource(
        name=name, domain="d", path=file, columns=columns, options=options, metrics=("rank",), limit=limit
    )
    rows = load_eval(source, 0, settings, make_encoder(TOKENIZER, settings.template, settings.loss_on), DATA)
    ranked = rank_classification(model, rows)
    sums = score_options(model, [[_tokens(option) for option in row.option_rows] for row in rows.rows])
    assert len(theirs.items) == len(ours.items) == len(rows.rows) == limit
    hits = 0.0
    for number, (first, second, row) in enumerate(zip(theirs.items, ours.items, rows.rows)):
        assert first.place.endswith(row.place) and first.place == second.place
        # 1e-4 nats, or two units in the last place of float32 where an option has hundreds of letters and nats
        assert first.scores == pytest.approx(second.scores, abs=1e-4, rel=2.4e-7)
        assert first.scores == pytest.approx(sums[number], abs=1e-4, rel=2.4e-7)
        letters = [len(option.text) for option in row.option_rows]
        for lengths in ([1] * len(letters), letters):
            shown = sorted(score / n for score, n in zip(first.scores, lengths))
            assert shown[-1] - shown[-2] > 10 * TIE, "rows that tie say nothing about a choice"
        assert first.hits == second.hits
        assert ranked["rank"].total[number] == first.hits["acc"]
        assert ranked["rank_by_byte"].total[number] == first.hits["acc_bytes"]
        best = max(range(len(letters)), key=lambda o: sums[number][o] / letters[o])
        assert float(best == row.answer_index) == first.hits["acc_norm"]
        hits += first.hits["acc"]
    assert 0 < hits < limit


@real_rows
@pytest.mark.parametrize("name", ["boolq", "arc_easy", "piqa"])
def test_they_agree_on_a_real_model_with_its_own_tokenizer(name):
    """Tokens of several letters: the boundary of prompt and option is the harness's, for both."""
    transformers = pytest.importorskip("transformers")
    folder = DATA.parent / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("no model beside the repository")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs, ours = (
        evaluate_tasks(model, tokenizer, [name], data=DATA, limit=10, scorer=scorer).tasks[0]
        for scorer in ("harness", "rank")
    )
    for first, second in zip(theirs.items, ours.items, strict=True):
        assert first.scores == pytest.approx(second.scores, abs=1e-4) and first.hits == second.hits
    assert (theirs.cut, theirs.fingerprint) == (ours.cut, ours.fingerprint)


@real_rows
def test_mmlu_takes_its_shots_from_the_dev_rows_of_the_subject(told):
    found = evaluate_tasks(
        pico_model(max_position_embeddings=4096), TOKENIZER, ["mmlu"], data=DATA, limit=4, scorer="rank"
    )
    from sparsmith.evaluating.harness.rows import _read

    dev = _read(DATA / "eval" / "mmlu_dev.jsonl.gz")
    for task in found.tasks:
        for sample in told["samples"][task.name]:
            mine = [row["question"].strip() for row in dev if row["subject"] == sample["doc"]["subject"]]
            _, *parts = sample["arguments"][0][0].split("Question: ")
            assert [part.split("\nA. ")[0] for part in parts[:-1]] == mine and len(mine) == task.shots == 5
    assert (
        set(found.groups) == {"mmlu"} and found.groups["mmlu"].chance == 0.25 and len(found.groups["mmlu"].items) == 4
    )
