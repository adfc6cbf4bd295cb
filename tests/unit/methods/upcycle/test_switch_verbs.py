"""The verbs on a tiny SwitchTransformers: what works, and what is refused with another way."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

import sparsmith as sm
from sparsmith.cli import main
from sparsmith.errors import RecipeErrors
from sparsmith.methods import registry
from sparsmith.recipe import load_recipe
from tests.kit.switching import make_switch_recipe, save_t5, switch_model


def called(capsys, *arguments):
    """(exit code, what was printed)."""
    code = main([str(one) for one in arguments])
    told = capsys.readouterr()
    return code, " ".join((told.out + told.err).split())


@pytest.mark.long
def test_plan_tune_eval_export_and_report(tmp_path, capsys):
    recipe, run, out = make_switch_recipe(tmp_path, moe={"capacity_factor": 1.5}), tmp_path / "run", tmp_path / "out"
    assert called(capsys, "plan", recipe)[0] == 0
    assert called(capsys, "tune", recipe)[0] == 0
    tuned = json.loads((run / "eval.json").read_text())
    before, after = (tuned[side]["sets"]["held"] for side in ("base", "tuned"))
    assert after["loss"]["value"] < before["loss"]["value"]
    assert {"rank", "exact_match"} <= after.keys()
    assert json.loads((run / "tables.json").read_text())["upcycle"]["layers"] == [1, 3, 5]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("upcycle/drop_rate" in line["health"] for line in lines)
    assert called(capsys, "eval", run)[0] == 0
    assert called(capsys, "export", run, out)[0] == 0
    card = (out / "README.md").read_text()
    assert "expert_capacity" in card and "text2text-generation" in card and "AutoModelForSeq2SeqLM" in card
    stock, ours = AutoModelForSeq2SeqLM.from_pretrained(out), sm.load(run)
    given = {"input_ids": torch.randint(4, 80, (2, 32)), "decoder_input_ids": torch.randint(4, 80, (2, 20))}
    with torch.no_grad():
        assert (stock(**given).logits - ours(**given).logits).abs().max() <= 1e-6  # kernels of other memory
    assert called(capsys, "eval", out, "--recipe", recipe)[0] == 0
    assert called(capsys, "verify", out)[0] == 0
    assert called(capsys, "report", run)[0] == 0
    for refused in (("generate", run, "--prompt", "say a"), ("bench", run)):
        code, told = called(capsys, *refused)
        assert code == 2 and "encoder-decoder" in told and "AutoModelForSeq2SeqLM" in told


@pytest.mark.long
def test_the_protocol_runs_its_three_setups(tmp_path, capsys):
    path = make_switch_recipe(tmp_path, steps=2)
    save_t5(tmp_path / "dense")
    recipe = yaml.safe_load(path.read_text())
    train, held = recipe["data"]["train"][0], recipe["data"]["eval"][0]
    recipe["protocol"] = {
        "task_steps": 3,
        "sides": {"dense": {"path": "dense", "settings": {"control": "dense"}}, "switch": {}},
        "pairs": [["dense", "switch"]],
        "tasks": [{"name": "letters", "train": train, "eval": {**held, "name": "own"}, "chance": 25}],
    }
    path.write_text(yaml.safe_dump(recipe))
    code, told = called(capsys, "protocol", "flan-moe", path, "--seeds", "0")
    assert code == 0, told
    written = json.loads((tmp_path / "run" / "comparison.json").read_text())
    table = {(row["side"], row["setup"], row["set"]): row["metrics"]["loss"]["value"] for row in written["table"]}
    own = {(side, setup): table[side, setup, "own"] for side in ("dense", "switch") for setup in (1, 3)}
    by_hand = (own["switch", 3] - own["switch", 1]) - (own["dense", 3] - own["dense", 1])
    gains = {row["metric"]: row["figures"] for row in written["gains"]}
    assert gains["loss"]["gain: 3 over 1"]["value"] == pytest.approx(by_hand, abs=1e-12)
    assert {(side, 2, "held") for side in ("dense", "switch")} <= table.keys()
    later = tmp_path / "run" / "switch-seed0-then-letters"
    assert yaml.safe_load((later / "recipe.yaml").read_text())["model"]["path"].endswith(
        "switch-seed0-instruct/settled"
    )
    assert all(row["training_flops_per_token"] > 0 for row in written["cost"])


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("data.packing", "true", "the encoder reads one prompt"),
        ("data.loss_on", "all", "has no effect"),
        ("data.template", "chat", "a text with {prompt}"),
        ("model.num_labels", "2", "task seq_cls"),
        ("methods", "[{method: soft}]", "which does causal_lm"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, key, value, said):
    path = make_switch_recipe(tmp_path)
    tasks = lambda method: registry.get(method).tasks  # noqa: E731
    with pytest.raises(RecipeErrors) as told:
        load_recipe(path, [f"{key}={value}"], method_configs=registry.config_classes(), tasks_of=tasks)
    assert any(said in str(fault) for fault in told.value.faults), told.value


def test_packing_is_off_by_the_task(tmp_path):
    recipe = load_recipe(make_switch_recipe(tmp_path), method_configs=registry.config_classes())
    assert recipe.data.packing is False


def test_the_wrong_task_names_the_right_one(tmp_path, capsys):
    recipe = make_switch_recipe(tmp_path)
    code, told = called(capsys, "plan", recipe, "model.task=causal_lm")
    assert code == 5 and "Set model.task to seq2seq" in told
    code, told = called(capsys, "plan", recipe, "model.path=embedded")
    assert code == 5 and "Set model.task to causal_lm" in told


def test_text_is_not_written_by_our_generation():
    from sparsmith.errors import UsageError
    from sparsmith.inference.faults import require_text

    with pytest.raises(UsageError, match=r"encoder-decoder.*AutoModelForSeq2SeqLM"):
        require_text(switch_model())
