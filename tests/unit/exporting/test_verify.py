"""`verify` works on a delta, a full checkpoint, an export and a run, and names what is wrong."""

from __future__ import annotations

import json
import shutil

import pytest

import sparsmith as sm
from sparsmith import durable
from sparsmith.errors import CheckpointError, CheckpointMismatch, RecipeErrors
from sparsmith.exporting import verify
from tests.kit.checkpoints import DELTA, IDENTITY, edit_json, edit_tensors
from tests.kit.pico import pico_model
from tests.kit.recipes import GOOD


def test_whole_folders_are_counted(home):
    delta, full = verify(home / "delta").folders[0], verify(home / "full").folders[0]
    assert (delta.kind, full.kind) == ("delta", "full")
    rows = json.loads((home / "full" / IDENTITY).read_text())["tensors"]
    assert full.tensors == len(rows) and full.parameters == sum(p.numel() for p in sm.load(home / "full").parameters())
    assert delta.parameters < full.parameters
    report = verify(home / "delta")
    assert "whole: " in str(report) and json.dumps(report.as_dict()) and report.as_dict()["passed"]


def test_every_sealed_folder_of_a_run_is_checked(home, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(home / "delta", run / "model")
    with durable.durable_folder(run / "checkpoints" / "step-000005") as step:
        shutil.copytree(home / "delta", step / "model", ignore=shutil.ignore_patterns("manifest.json"))
        (step / "trainer.json").write_text("{}")
    durable.write_text(run / "recipe.yaml", GOOD)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    (run / "checkpoints" / ".step-000010.writing-ab").mkdir()
    kinds = {folder.path.removeprefix(str(run)): folder.kind for folder in verify(run).folders}
    assert kinds == {"": "run", "/model": "delta", "/checkpoints/step-000005": "files"}
    step = run / "checkpoints" / "step-000005"
    data = bytearray((step / "model" / DELTA).read_bytes())
    data[-1] ^= 1
    (step / "model" / DELTA).write_bytes(data)
    with pytest.raises(CheckpointError, match="step-000005"):
        verify(run)


def test_the_figures_of_a_run_are_read(home, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(GOOD)
    assert [folder.kind for folder in verify(run).folders] == ["run"]
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": NaN}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        verify(run)
    (run / "metrics.jsonl").unlink()
    (run / "recipe.yaml").write_text(GOOD.replace("steps: 10", "stpes: 10"))
    with pytest.raises(RecipeErrors, match=r"recipe\.yaml:22: train\.stpes"):
        verify(run)


def test_a_base_is_held_against_its_config(home, tmp_path):
    report = verify(home / "base").folders[0]
    assert (report.kind, report.files) == ("base", 2)
    assert report.parameters == sum(p.numel() for p in pico_model().parameters())
    base = shutil.copytree(home / "base", tmp_path / "base")
    edit_tensors(base / "model.safetensors", lambda t: t["lm_head.weight"].fill_(float("nan")), sealed=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: found NaN or infinity"):
        verify(base)
    edit_tensors(base / "model.safetensors", lambda t: t.pop("lm_head.weight"), sealed=False)
    with pytest.raises(CheckpointMismatch, match=r"lm_head\.weight: found no such tensor"):
        verify(base)


def test_what_is_wrong_is_named(home, tmp_path):
    def fresh(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(home / name, tmp_path / name)
        return tmp_path / name

    folder = fresh("full")
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors["base.lm_head.weight"].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"base\.lm_head\.weight: found NaN or infinity"):
        verify(folder)
    folder = fresh("full")
    edit_json(folder / "config.json", lambda data: data["pesc"].update(top_k=1))
    with pytest.raises(CheckpointMismatch, match=r"pesc\.top_k: found 1; expected 2"):
        verify(folder)
    folder = fresh("delta")
    edit_json(folder / IDENTITY, lambda data: data["configs"][0].update(adapter_scale=1.0))
    with pytest.raises(CheckpointMismatch, match=r"configs\.0\.adapter_scale: found 1.0; expected 0.25"):
        verify(folder)
    folder = fresh("delta")
    edit_json(folder / IDENTITY, lambda data: data["tensors"].popitem())
    with pytest.raises(CheckpointMismatch, match="nothing asks for"):
        verify(folder)


def test_what_is_no_checkpoint_is_told(home, tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError):
            verify(path)
    shutil.copytree(home / "delta", tmp_path / "cut")
    (tmp_path / "cut" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(tmp_path / "cut")
