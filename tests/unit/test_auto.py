"""`import sparsmith` teaches transformers' Auto classes, in either order of imports, and costs no torch.

Two processes share one full checkpoint: starting one costs seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsmith as sm
from tests.kit.checkpoints import crafted, save_base
from tests.kit.pico import pico_ids

OURS_FIRST = """
import sys, time
begun = time.perf_counter()
import sparsmith
facts = {"seconds": time.perf_counter() - begun, "heavy": [n for n in ("torch", "transformers", "pydantic") if n in sys.modules]}
from transformers import AutoConfig, AutoModelForCausalLM
facts["config"] = type(AutoConfig.from_pretrained(FULL)).__module__
model = AutoModelForCausalLM.from_pretrained(FULL)
"""
THEIRS_FIRST = """
from transformers import AutoConfig, AutoModelForCausalLM
facts = {}
try:
    AutoModelForCausalLM.from_pretrained(FULL, trust_remote_code=False)
except ValueError as fault:
    facts["refused"] = str(fault)
import sparsmith
model = AutoModelForCausalLM.from_pretrained(FULL)
delta = sparsmith.load(DELTA)
facts["delta"] = delta(torch_ids()).logits.tolist()
"""
TAIL = """
import json
facts["class"] = type(model).__module__
facts["logits"] = model(torch_ids()).logits.tolist()
print("FACTS" + json.dumps(facts))
"""
HEAD = """
def torch_ids():
    import torch
    torch.set_num_threads(1)
    return torch.tensor(IDS)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    model = crafted(save_base(home / "base"))
    sm.save(model, home / "delta")
    torch.save(model(pico_ids()).logits.detach(), home / "delta.pt")
    sm.save(sm.settle(model), home / "full", full=True)
    torch.save(model(pico_ids()).logits.detach(), home / "full.pt")
    return home


def run(script: str, home: Path, tmp_path: Path) -> dict:
    names = {"FULL": str(home / "full"), "DELTA": str(home / "delta"), "IDS": pico_ids().tolist()}
    text = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + HEAD + script + TAIL
    source = str(Path(sm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", text], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("FACTS")[1])


def test_ours_first(home, tmp_path):
    facts = run(OURS_FIRST, home, tmp_path)
    assert facts["heavy"] == []
    assert facts["config"] == facts["class"] == "sparsmith.methods.pesc.modeling"
    assert torch.equal(torch.tensor(facts["logits"]), torch.load(home / "full.pt", weights_only=True))


def test_theirs_first_and_a_delta_in_a_fresh_process(home, tmp_path):
    facts = run(THEIRS_FIRST, home, tmp_path)
    assert "contains custom code" in facts["refused"]
    assert facts["class"] == "sparsmith.methods.pesc.modeling"
    assert torch.equal(torch.tensor(facts["logits"]), torch.load(home / "full.pt", weights_only=True))
    assert torch.equal(torch.tensor(facts["delta"]), torch.load(home / "delta.pt", weights_only=True))


def test_without_the_model_code_beside_it_the_type_is_unknown(home):
    """A config that names no code, and a process that does not know the type: refused, not opened as a dense model."""
    from transformers import LlamaForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert "sparsmith_pesc" in CONFIG_MAPPING and "sparsmith_pesc" not in list(CONFIG_MAPPING._mapping)
    try:
        _, info = LlamaForCausalLM.from_pretrained(home / "full", output_loading_info=True)
    except Exception as fault:  # whatever a foreign class says, as long as it does not open
        assert str(fault)
        return
    rows = json.loads((home / "full" / "sparsmith.json").read_text())["tensors"]
    ffn = [name for name in info["missing_keys"] if ".mlp." in name]
    assert len(ffn) == sum(".mlp.ffn." in name for name in rows) == 6


def test_installing_twice_watches_once():
    from sparsmith import auto

    auto.install()
    assert sum(isinstance(finder, auto._Watcher) for finder in sys.meta_path) == 1
    assert auto.real_class("llama") is None and auto.real_class("sparsmith_pesc").__name__ == "SparsmithPescForCausalLM"


def test_the_stand_in_gives_way_to_the_real_class():
    from sparsmith import auto
    from sparsmith.methods.pesc.modeling import SparsmithPescConfig

    stand_in = auto._stand_in("sparsmith_pesc")
    assert isinstance(stand_in(), SparsmithPescConfig) and isinstance(stand_in.from_dict({}), SparsmithPescConfig)
