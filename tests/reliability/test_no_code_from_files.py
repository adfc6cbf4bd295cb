"""Promise 16: nothing that is read can run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import sparsmith as sm
from sparsmith import durable
from sparsmith.errors import SparsmithError
from sparsmith.exporting import verify
from tests.kit.checkpoints import DELTA, IDENTITY, crafted, edit_json, save_base

SOURCE = Path(sm.__file__).parent
# attribute calls that read a pickle or run text; `yaml.load` and torch.load without weights_only=True are caught apart
FORBIDDEN = {
    "pickle": {"load", "loads", "Unpickler"},
    "marshal": {"load", "loads"},
    "yaml": {"load", "unsafe_load", "full_load"},
}
FORBIDDEN |= {"joblib": {"load"}, "dill": {"load", "loads"}, "shelve": {"open"}, "os": {"system", "popen"}}


def faults(tree: ast.AST) -> list[str]:
    """Calls that could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
            found.append(node.func.id)
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            home, name = node.func.value.id, node.func.attr
            if name in FORBIDDEN.get(home, ()):
                found.append(f"{home}.{name}")
            if (home, name) == ("torch", "load") and options.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
        if options.get("weights_only") is False or options.get("shell") is True:
            found.append("weights_only=False or shell=True")
        if options.get("trust_remote_code") is True:
            found.append("trust_remote_code=True as a constant")
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_the_source_holds_no_call_that_runs_a_file(file):
    assert faults(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        *["eval(x)", "exec(x)", "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)"],
        *["f(trust_remote_code=True)", "os.system(x)", "run(x, shell=True)"],
    ],
)
def test_the_check_itself_sees(text):
    assert faults(ast.parse(text))


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    model = crafted(save_base(home / "base"))
    sm.save(model, home / "delta")
    sm.save(model, home / "full", full=True)
    return home


SLOTS = [f"delta/{DELTA}", f"delta/{IDENTITY}", "delta/adapter_model.safetensors", "delta/adapter_config.json"]
SLOTS += ["full/model.safetensors", "full/config.json", "full/generation_config.json", f"full/{IDENTITY}"]
SLOTS += ["delta/manifest.json", "full/manifest.json", "base/model.safetensors", "base/config.json"]


@pytest.mark.parametrize("slot", SLOTS)
def test_a_pickle_in_any_slot_does_not_run(home, tmp_path, slot):
    shutil.copytree(home, tmp_path / "home")
    bomb = tmp_path / "home" / slot
    bomb.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    if bomb.name != "manifest.json" and bomb.parent.name != "base":
        durable.seal(bomb.parent)
    kind = "full" if slot.startswith("full") else "delta"
    options = {"base": tmp_path / "home" / "base"} if kind == "delta" else {}
    with pytest.raises(SparsmithError):
        sm.load(tmp_path / "home" / kind, **options)
    if not slot.startswith("base"):
        with pytest.raises(SparsmithError):
            verify(tmp_path / "home" / kind)
    assert not (tmp_path / "ran").exists()


def test_model_code_of_a_full_checkpoint_does_not_run(home, tmp_path):
    """Our own class is used; the file beside the weights is for those who do not have it."""
    folder = tmp_path / "full"
    shutil.copytree(home / "full", folder)
    code = folder / "modeling_sparsmith_pesc.py"
    code.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n" + code.read_text())
    durable.seal(folder)
    sm.load(folder)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_base_does_not_run(home, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    (base / "mine.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    data = json.loads((base / "config.json").read_text())
    for model_type in ("llama", "somebody_elses"):
        auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        (base / "config.json").write_text(json.dumps({**data, "model_type": model_type, "auto_map": auto_map}))
        with suppress(SparsmithError):
            sm.load(home / "delta", base=base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "../pesc", "sparsmith.methods.pesc.config:PescConfig"])
def test_a_method_name_is_looked_up_and_never_imported(home, tmp_path, name):
    folder = tmp_path / "full"
    shutil.copytree(home / "full", folder)
    edit_json(folder / IDENTITY, lambda data: data["configs"][0].update(method=name))
    for open_it in (sm.load, verify):
        with pytest.raises(SparsmithError):
            open_it(folder)
