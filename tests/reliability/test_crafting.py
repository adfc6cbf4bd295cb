"""Promises 10 to 14 in short, and each trial shown to fail where its promise is broken."""

from __future__ import annotations

import pytest
import torch

import sparsmith as sm
from sparsmith.crafting import apply
from sparsmith.crafting import settle as settling_module
from sparsmith.errors import RefusedDonor
from sparsmith.methods.pesc.layers import PescAdapters
from tests.kit.cases import METHODS, TAKES, base_config_for, cases, few
from tests.kit.pico import FAMILIES
from tests.kit.trials import all_or_nothing, exports, neutral, settling, what_trains

ONE = (("pesc",), ("llama",))


def whole(tally):
    assert tally.whole, tally.failures
    return tally


def test_promise_10_craft_is_neutral():
    figures = whole(neutral.trial(few())).figures
    assert figures["largest difference"] == 0.0 < figures["largest difference by rounding"]


def test_what_a_case_leaves_out_is_refused():
    for name, taken in TAKES.items():
        for family in FAMILIES.keys() - set(taken):
            with pytest.raises(RefusedDonor):
                sm.plan(base_config_for(METHODS[name], family), METHODS[name])


def test_the_trial_sees_a_craft_that_is_not(monkeypatch):
    real = PescAdapters.reset
    monkeypatch.setattr(PescAdapters, "reset", lambda self, layer: (real(self, layer), self.up.data.fill_(1e-6)))
    tally = neutral.trial(cases(*ONE))
    assert not tally.held and "plain" in tally.failures[0]


def test_promise_11_craft_is_all_or_nothing():
    of = [*cases(*ONE), *cases(("dense LoRA",), ("gpt2",)), *cases(("upcycle, lora",), ("qwen3",))]
    assert whole(all_or_nothing.trial(of, draws=8)).tried == 24


def test_a_copy_that_fails_leaves_the_original_alone():
    count = len(all_or_nothing.steps_of(METHODS["pesc"], "gemma2"))
    model = all_or_nothing.model_for("gemma2")
    before = all_or_nothing.picture(model)
    with pytest.raises(all_or_nothing.Planted), all_or_nothing.Steps(count // 2):
        sm.craft(model, METHODS["pesc"])
    assert all_or_nothing.differences(before, all_or_nothing.picture(model)) == []


def test_the_trial_sees_what_is_not_put_back(monkeypatch):
    monkeypatch.setattr(apply, "_put_back", lambda attributes, before: None)
    tally = all_or_nothing.trial(cases(*ONE), draws=4)
    assert tally.held < tally.tried


def test_promise_12_what_trains_is_what_was_said(tmp_path):
    of = [*cases(*ONE), *cases(("dense LoRA",), ("gpt2",)), *cases(("upcycle, lora",), ("qwen3",))]
    tally = whole(what_trains.trial(tmp_path, of, steps=22))
    assert 2 <= tally.figures["last step in which a tensor got its first gradient"] <= what_trains.REACHED_WITHIN


@pytest.mark.parametrize("broken", ["frozen", "unreached"])
def test_the_trial_sees_another_tensor_move_and_a_tensor_without_gradient(tmp_path, monkeypatch, broken):
    real = sm.craft

    def craft(*args, **kwargs):
        model = real(*args, **kwargs)
        norm = model.base.model.norm

        def drift(*_):
            norm.weight.data.mul_(1.01)

        if broken == "frozen":
            norm.register_forward_hook(drift)
        else:
            model.base.model.layers[0].register_forward_hook(lambda module, args, output: output.detach())
        return model

    monkeypatch.setattr(sm, "craft", craft)
    tally = what_trains.trial(tmp_path, cases(*ONE), steps=3, within=3)
    assert not tally.held and {"frozen": "model.norm", "unreached": "layers.0"}[broken] in tally.failures[0]


def test_promise_13_settle_tells_the_truth():
    whole(settling.trial(few()))


def test_the_trial_sees_a_merge_that_is_wrong(monkeypatch):
    real = settling_module._merge_one

    def wrong(name, layer, linear):
        layer.scaling["default"] *= 1.001
        return real(name, layer, linear)

    monkeypatch.setattr(settling_module, "_merge_one", wrong)
    monkeypatch.setattr(settling_module, "_check", lambda *_: None)
    tally = settling.trial(cases(*ONE))
    assert not tally.held and "logits differ" in tally.failures[0]


def test_promise_14_exports_open_elsewhere(tmp_path):
    of = [*cases(*ONE), *cases(("dense LoRA",), ("gpt2",)), *cases(("upcycle, lora",), ("qwen3",))]
    assert whole(exports.trial(tmp_path, of)).figures["stock classes"] == 2


def test_the_trial_sees_an_export_of_something_else(tmp_path, monkeypatch):
    def elsewhere(work, requests):
        name = requests[0]["name"]
        keys = {"missing_keys": ["lm_head.weight"], "unexpected_keys": [], "mismatched_keys": []}
        answer = {"class": "LlamaForCausalLM", "module": "transformers.models.llama.modeling_llama", **keys}
        theirs = {f"{name}/{read}": torch.zeros(()) for read in (*exports.READ, "greedy")}
        return {"sparsmith was imported": True, name: answer}, theirs

    monkeypatch.setattr(exports, "read_elsewhere", elsewhere)
    tally = exports.trial(tmp_path, cases(("dense LoRA",), ("llama",)))
    assert tally.held == 0 and len(tally.failures) == 2
    assert all(text in tally.failures[1] for text in ("logits differ", "lm_head.weight", "another text"))
