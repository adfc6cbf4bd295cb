"""The script that trains the embedded base: it trains, goes on from its checkpoint, and writes a folder that stock classes open."""

from __future__ import annotations

import json

import torch
import train_base
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_trains_goes_on_and_exports(no_files, tmp_path, capsys):
    threads = torch.get_num_threads()
    for steps in ("1", "2"):
        train_base.main(["train", "--out", str(tmp_path / "run"), "--steps", steps, "--rows-per-domain", "1"])
    torch.set_num_threads(threads)
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["state"]["step"] == 2
    train_base.main(["export", "--out", str(tmp_path / "run"), "--to", str(tmp_path / "model")])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["tokens"] == 2 * 3 * 512

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    trained = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, trained[name].bfloat16()) for name, value in model.state_dict().items())
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & settings.keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").decode([1]) == "<s>"
