"""Spec 5, test 12 and promise 14: an export opens in a clean process with equal logits, or is not kept."""

from __future__ import annotations

import json

import pytest
import torch

import sparsmith as sm
from sparsmith import durable
from sparsmith.errors import EnvironmentFault, ProofError
from sparsmith.exporting import prove as proving
from sparsmith.exporting.folder import export
from tests.kit.checkpoints import crafted, save_base
from tests.kit.pico import VOCAB, pico_ids

pytestmark = pytest.mark.usefixtures("real_strangers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *[chr(code) for code in range(33, 33 + VOCAB - 3)]]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def test_an_export_proves_itself_and_says_so(base, tmp_path, tokenizer):
    model = crafted(base, adapter_scale=0.3).train()
    facts = {
        "recipe": "model: {path: ./base}",
        "run": {"seed": 42, "versions": {"torch": "x"}},
        "proof": {"craft": CRAFT},
    }
    report = sm.export(model, tmp_path / "out", tokenizer=tokenizer, fold_scale=True, facts=facts)
    assert model.training and model.peft_config
    out = tmp_path / "out"
    assert report.path == out and report.needs_code and report.model_type == "sparsmith_pesc"
    proof = json.loads((out / "proof.json").read_text())
    assert proof == report.proof and proof["passed"] and proof["bitwise"] and proof["value"] == 0.0
    assert proof["refused_without_code"] is True and proof["class"] == "SparsmithPescForCausalLM"
    assert report.parameters["total"] > report.parameters["active"] > 0
    assert report.conversion["max_logit_difference"] < 1e-6
    durable.verify_folder(out)
    card = (out / "README.md").read_text()
    for text in (
        "equal bit for bit",
        "craft leaves",
        "| `top_k` | `2` |",
        "model: {path: ./base}",
        "trust_remote_code=True",
    ):
        assert text in card, text
    assert f"{report.parameters['total']:,}" in card and str(base) not in card
    assert str(base) not in (out / "config.json").read_text()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert "equal" in str(report) and json.dumps(report.as_dict())
    again = sm.load(out)
    assert (again(pico_ids()).logits - model.eval()(pico_ids()).logits).abs().max() < 1e-5


CRAFT = {"check": "craft leaves the logits unchanged", "bitwise": True, "value": 0.0, "limit": 0.0, "passed": True}


def test_a_control_exports_as_a_stock_checkpoint_from_its_folder(base, tmp_path, tokenizer):
    sm.save(crafted(base, control="equal_lora", adapter_dim=8), tmp_path / "delta", tokenizer=tokenizer)
    report = export(tmp_path / "delta", tmp_path / "out", dtype="bfloat16")
    assert not report.needs_code and report.model_type == "llama" and report.proof["bitwise"]
    assert not list((tmp_path / "out").glob("*.py")) and (tmp_path / "out" / "tokenizer.json").is_file()
    assert report.conversion["max_logit_difference"] > 0 and report.settle["merge"]["mean_kl"] < 1e-6
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == torch.bfloat16 and type(stock).__name__ == "LlamaForCausalLM"


def test_a_failed_proof_keeps_no_folder(base, tmp_path, monkeypatch):
    model = crafted(base, lora={"enabled": False})
    wrong = {"limit": 1e-5, "value": 0.1}

    def off(request, work, timeout):
        from safetensors.torch import save_file

        logits = proving.probe_logits(model, 42)
        save_file({"logits": logits + wrong["value"]}, work / "logits.safetensors")
        keys = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return {**keys, "refused_without_code": True, "torch": "x", "transformers": "y", "class": "z"}

    monkeypatch.setattr(proving, "_ask", off)
    with pytest.raises(ProofError, match="differ by"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    wrong["value"] = 1e-6
    report = export(model, tmp_path / "out")
    assert report.proof["passed"] and not report.proof["bitwise"] and "rounding" in report.proof["reason"]
    assert "rounding" in str(report)


@pytest.mark.parametrize("fault", ["missing_keys", "refused_without_code", "token_ids"])
def test_what_a_clean_process_reports_counts(base, tmp_path, fault, tokenizer):
    answer = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "refused_without_code": True}
    answer["token_ids"] = list(tokenizer(proving._TEXT)["input_ids"])
    proving._check_answer(tmp_path, answer, True, tokenizer)
    answer[fault] = {"missing_keys": ["w"], "refused_without_code": False, "token_ids": [1]}[fault]
    with pytest.raises(ProofError):
        proving._check_answer(tmp_path, answer, True, tokenizer)


def test_a_process_that_fails_or_hangs_is_told(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    monkeypatch.setattr(proving, "CHILD", child)
    request = {"folder": "out", "threads": 1}
    child.write_text("raise SystemExit('cannot open it')")
    with pytest.raises(ProofError, match="cannot open it"):
        proving._ask(request, tmp_path, 30)
    child.write_text("import time; time.sleep(30)")
    with pytest.raises(EnvironmentFault, match="no answer"):
        proving._ask(request, tmp_path, 0.5)


def test_without_proof_the_card_says_so(base, tmp_path):
    report = export(crafted(base, lora={"enabled": False}), tmp_path / "out", proof=False)
    assert report.proof is None and not (tmp_path / "out" / "proof.json").exists()
    assert "not run" in (tmp_path / "out" / "README.md").read_text() and "not proven" in str(report)
