"""Promise 5 in short, and what its trial does not reach: masked-out weights, loss scales, two ranks, the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsmith as sm
from sparsmith.cli import main
from sparsmith.crafting.apply import trained_roles
from sparsmith.errors import ProofError
from sparsmith.training.callbacks.guard import MAX_SKIPPED, Guard
from tests.kit import forks
from tests.kit.small_run import make_recipe
from tests.kit.trials import guard as trials


def test_promise_5_in_short(tmp_path):
    tally = trials.trial(tmp_path, count=2, last=8)
    assert tally.whole and tally.tried == 1 + 2 * len(trials.PLANTS), tally.failures


def test_there_is_one_look_per_step_and_it_sees_every_micro_batch(tmp_path, monkeypatch):
    looks = []
    real = Guard._look
    monkeypatch.setattr(Guard, "_look", lambda self, *given: looks.append(len(given[0])) or real(self, *given))
    trials.pesc_tuner(tmp_path, [], steps=3, save_strategy="no").train()
    assert looks == [2, 2, 2]


def test_a_weight_that_no_token_uses_is_found(tmp_path):
    """The loss and the gradient are finite; the number would be saved, and meet a token some day."""
    plant = trials.Plant(2, 0)
    tuner = trials.pesc_tuner(tmp_path, [plant], save_strategy="no")
    module = tuner.crafted.base.model.layers[0].mlp.pesc
    module.register_forward_hook(lambda module, args, output: args[0])  # the adapters are passed by
    plant.at_begin = lambda: module.up.data[3, 0, 0].fill_(float("inf"))
    with pytest.raises(ProofError, match=r"step 2: found a trained parameter .* `base.model.layers.0.mlp.pesc`"):
        tuner.train()


@pytest.mark.parametrize(
    "settings", [{}, {"schedule": "sampled"}, {"trunk": "frozen"}], ids=["all", "sampled", "frozen"]
)
def test_a_method_that_owns_its_loss_is_watched_as_well(tmp_path, settings):
    """A number that is none in the head, which every exit reads, and one in a block below all of them."""
    for where in ("lm_head", "model.layers.1"):
        config = sm.SoftConfig(exits=(2, 4), **settings)
        plant = trials.Plant(3, 0)
        tuner = trials.pesc_tuner(tmp_path / where, [plant], config=config, save_strategy="no")
        weight = next(tuner.crafted.get_submodule(where).parameters())
        plant.at_begin = lambda weight=weight: weight.data.view(-1)[:1].fill_(float("nan"))
        with pytest.raises(ProofError, match="step 3: ") as stop:
            tuner.train()
        assert tuner.state.global_step == 2 and stop.value.exit_code == 8


def test_a_norm_that_overflows_is_found_though_each_gradient_is_finite(tmp_path):
    tuner = trials.pesc_tuner(tmp_path, [], save_strategy="no")
    _, parameter = trained_roles(tuner.crafted)["router"][1]
    parameter.register_hook(lambda grad: torch.full_like(grad, 1e30))
    with pytest.raises(ProofError, match=r"step 1: found a gradient of norm inf; .*layers\.1\.mlp\.pesc\.router.*norm"):
        tuner.train()


def test_a_fault_that_does_not_come_back_is_told_so(tmp_path):
    tuner = trials.pesc_tuner(tmp_path, [], save_strategy="no")
    calls = []

    def once(module, args, output):
        calls.append(1)
        return {**output, "loss": output["loss"] * float("nan")} if len(calls) == 3 else None

    tuner.model.register_forward_hook(once)
    with pytest.raises(ProofError, match=r"step 2: .*did not come back .*samples 4, 5, 6, 7") as stop:
        tuner.train()
    assert "doubt the memory" in stop.value.mend


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_are_looked_at_before_the_first_and_after_the_last_step(tmp_path, when):
    tuner = trials.pesc_tuner(tmp_path, [], steps=1, save_strategy="no")
    weight = tuner.crafted.base.model.norm.weight if when == "before" else trained_roles(tuner.crafted)["adapter"][0][1]
    if when == "before":
        weight.data[0] = float("nan")
    else:
        tuner.create_optimizer()
        tuner.optimizer.register_step_post_hook(lambda *_: weight.data.fill_(float("nan")))
    with pytest.raises(
        ProofError, match={"before": "step 0, before training", "after": "step 1, after the optimiser"}[when]
    ):
        tuner.train()


def test_a_run_that_diverges_ends_with_its_rows_and_code_8(tmp_path, capsys):
    """Nothing is planted here: the learning rate is far too large, as people set it."""
    recipe = make_recipe(tmp_path, steps=8, save_every=1, eval_every=None, schedule="constant")
    code = main(["tune", str(recipe), "train.learning_rate=1e30", "--json"])
    fault = json.loads(capsys.readouterr().out)["error"]
    assert code == 8 and fault["kind"] == "ProofError", fault
    step = re.fullmatch(r"step (\d+).*", fault["where"])
    assert step and 1 <= int(step[1]) <= 8
    assert re.search(r"first bad module `base\.model\.\S+`", fault["found"])
    assert re.search(r"samples [\d, ]+ \(\S*(sums|words)\.jsonl:\d+", fault["found"])
    assert "learning_rate" in fault["mend"]
    on_disk = list(trials.tensors_on_disk(tmp_path / "run"))
    assert all(tensor.isfinite().all() for _, tensor in on_disk if tensor.is_floating_point())
    assert not (tmp_path / "run" / "model").exists()


class _Steps:
    """A guard with a float16 loss scale, one look at a time."""

    def __init__(self) -> None:
        model = torch.nn.Linear(2, 2)
        self.guard = Guard(model)
        self.guard.attach(SimpleNamespace(model=model, accelerator=SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))))
        self.state = SimpleNamespace(global_step=0)
        self.guard.on_train_begin(None, self.state, None)

    def look(self, loss: float, norm: float) -> None:
        self.guard.saw(torch.tensor(loss))
        self.guard.norm = torch.tensor(norm)
        self.guard.on_pre_optimizer_step(None, self.state, None)


def test_a_loss_scale_may_overflow_but_not_for_ever():
    steps = _Steps()
    for _ in range(MAX_SKIPPED - 1):
        steps.look(1.0, float("inf"))
    steps.look(1.0, 2.0)  # one good step, and the count begins anew
    for _ in range(MAX_SKIPPED - 1):
        steps.look(1.0, float("nan"))
    with pytest.raises(ProofError, match="bfloat16 or float32"):
        steps.look(1.0, float("inf"))


def test_a_loss_that_overflows_in_float16_stops_at_once():
    with pytest.raises(ProofError, match="a loss of inf"):
        _Steps().look(float("inf"), float("inf"))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    plant = trials.Plant(2, 0)
    tuner = trials.pesc_tuner(Path(folder), [plant], save_strategy="no", ddp_backend="gloo")
    router = tuner.crafted.base.model.layers[1].mlp.pesc.router

    def spoil(module, args, output):
        return output + float("nan") if plant.armed and rank == 1 else None

    router.register_forward_hook(spoil)
    try:
        tuner.train()
    except ProofError as stop:
        Path(folder, f"{rank}.txt").write_text(str(stop))
    torch.distributed.destroy_process_group()


def test_two_ranks_stop_together_with_the_same_words(tmp_path):
    forks.ranks(_rank, (str(tmp_path),), tmp_path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("step 2: found on rank 1 a loss of nan") and "layers.1.mlp.pesc.router" in first
