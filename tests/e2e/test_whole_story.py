"""The verbs one after the other through the command line, on the embedded base and tasks: what a user does on the first day."""

from __future__ import annotations

import json

import pytest
import yaml

from sparsmith.cli import main
from sparsmith.embedded.tasks import DOMAINS, write_jsonl

COLUMNS = {"prompt": "prompt", "completion": "completion"}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A finished run: (folder of the story, recipe path, run path)."""
    root = tmp_path_factory.mktemp("story")
    rows = write_jsonl(root, seed=1, train=400, held_out=30)

    def source(domain, split, **more):
        return {
            "name": domain,
            "domain": domain,
            "path": str(rows[split]),
            "columns": COLUMNS,
            "where": {"domain": domain},
            **more,
        }

    recipe = {
        "model": {"path": "embedded"},
        "methods": [{"method": "pesc", "num_experts": 4, "top_k": 2, "adapter_dim": 16, "lora": {"r": 4}}],
        "data": {
            "train": [source(d, "train") for d in DOMAINS],
            "eval": [source(d, "held_out", metrics=["loss", "exact_match"], max_new_tokens=8) for d in DOMAINS],
            "max_length": 128,
            "mixing": "balanced",
            "cache": str(root / "cache"),
        },
        "train": {
            "steps": 24,
            "batch_size": 8,
            "learning_rate": 5.0e-3,
            "log_every": 4,
            "eval_every": 12,
            "save_every": 12,
        },
        "output": str(root / "run"),
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["tune", str(path)]) == 0
    return root, path, root / "run"


def run(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out)


def test_the_run_has_learned_and_says_so(story):
    _, _, run_folder = story
    evaluation = json.loads((run_folder / "eval.json").read_text())
    before, after = (evaluation[which]["overall"]["loss"]["value"] for which in ("base", "tuned"))
    assert after < before - 0.5
    proof = json.loads((run_folder / "proof.json").read_text())
    assert proof["craft"]["bitwise"] is True and proof["during"]["passed"] is True
    assert set(proof["during"]["value"]) == {"adapter", "router", "lora"}
    facts = json.loads((run_folder / "run.json").read_text())
    assert facts["rows"] == 24 * 8 and facts["tokens_trained"] > 0 and facts["finished"]
    loads = json.loads((run_folder / "tables.json").read_text())["pesc"]["load"]
    assert all(sum(layer) == pytest.approx(1, abs=1e-6) for layer in loads)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "eval_loss" in line} == {0, 12, 24}
    assert set(next(line for line in lines if "domain_loss" in line)["domain_loss"]) <= set(DOMAINS)
    assert (run_folder / "report.html").stat().st_size > 50_000


def test_plan_agrees_with_what_was_trained(story, capsys):
    _, recipe, run_folder = story
    code, plan = run(capsys, "plan", recipe)
    assert code == 0
    proof = json.loads((run_folder / "proof.json").read_text())
    assert plan["parameters"]["trained"] == proof["craft"]["trained"]["value"]


def test_eval_again_gives_the_same_figures(story, capsys):
    _, _, run_folder = story
    code, again = run(capsys, "eval", run_folder)
    assert code == 0
    first = json.loads((run_folder / "eval.json").read_text())["tuned"]
    assert again["overall"]["loss"]["value"] == pytest.approx(first["overall"]["loss"]["value"], abs=1e-6)
    assert again["overall"]["exact_match"] == first["overall"]["exact_match"]


def test_generate_answers(story, capsys):
    _, _, run_folder = story
    code, answer = run(capsys, "generate", run_folder, "--prompt", "2 + 3 =", "--max-new-tokens", "8")
    assert code == 0 and isinstance(answer, dict)


def test_export_verify_report(story, capsys):
    root, _, run_folder = story
    code, exported = run(capsys, "export", run_folder, root / "export")
    assert code == 0, exported
    assert json.loads((run_folder / "proof.json").read_text())["export"]["passed"] is True
    assert run(capsys, "verify", root / "export")[0] == 0
    assert run(capsys, "verify", run_folder / "model")[0] == 0
    page = root / "side-by-side.html"
    assert run(capsys, "report", run_folder, "--out", page)[0] == 0
    assert page.is_file()


def test_a_damaged_export_is_named(story, capsys):
    root, _, _ = story
    if not (root / "export").is_dir():
        pytest.skip("the export test did not run before")
    file = next((root / "export").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, out = run(capsys, "verify", root / "export")
    file.write_bytes(whole)
    assert code == 7 and file.name in json.dumps(out)


def test_a_finished_run_is_not_overwritten(story, capsys):
    _, recipe, _ = story
    code, out = run(capsys, "tune", recipe)
    assert code == 2 and "finished run" in out["error"]["found"], out


def test_data_show_marks_the_answer(story, capsys):
    _, recipe, _ = story
    code, view = run(capsys, "data", "show", recipe)
    assert code == 0
    trained = "".join(text for text, is_trained in view["rows"][0]["pieces"] if is_trained)
    assert trained and view["rows"][0]["place"].count(":") >= 1
