"""Gates through a cut: a resumed run draws the same noise and ends with the same bits, before, across and after the hard choice."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import gates_of
from sparsmith.methods.finegates.method import FINEGATES
from tests.kit.gates import SCHEDULE, gates_config
from tests.kit.pico import pico_model
from tests.kit.rows import RowDataset, pad_rows

LORA = {"r": 2, "dropout": 0.1}
CONFIGS = {
    "structured": gates_config(lora=LORA, gates={"lr": 0.6, "attention": "kv_groups+q_heads", "polarise": 0.1}),
    "paper": gates_config("paper", lora=LORA, gates={"lr": 0.6}),
    "paper, kurtosis": gates_config("paper", gates={"lr": 0.6}, paper={"kurtosis": True}),
    "by importance": FineGatesConfig.model_validate(
        {"lora": LORA, "gates": {"lr": 0.6, "noise_sigma": 0.1}, "schedule": SCHEDULE | {"hold": 0.1}}
    ),
    "a rival": gates_config(baseline="flap_like", lora=LORA, schedule={"hold": 0.1, "warmup": 0.1, "settle_at": 0.1}),
}
STEPS = 12
CUTS = (3, 6, 9)
"""Of 12 steps: gates learn from step 1 and are hard from step 8."""


class Noise(sm.Tuner):
    """Keeps the noise of every micro-batch."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        drawn = torch.cat([gate.noise for _, gate in gates_of(self.crafted)]).clone()
        self.drawn = [*getattr(self, "drawn", []), drawn]
        return loss


def tuner(folder, name, checkpointing=False):
    model = sm.craft(pico_model(), CONFIGS[name], seed=3)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        activation_checkpointing=checkpointing,
    )
    return Noise(model=model, args=args, train_dataset=RowDataset(20), data_collator=pad_rows)


def losses(one):
    return {line["step"]: line["loss"] for line in one.state.log_history if "loss" in line}


@pytest.fixture(scope="module", params=CONFIGS)
def uncut(request, tmp_path_factory):
    one = tuner(tmp_path_factory.mktemp("uncut"), request.param)
    one.train()
    return request.param, one


@pytest.mark.parametrize("cut", CUTS)
def test_a_resumed_run_has_the_same_bits_and_the_same_noise(uncut, tmp_path, cut):
    name, whole = uncut
    again = tuner(tmp_path, name)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{cut}")
    assert {s: v for s, v in losses(whole).items() if s > cut} == {s: v for s, v in losses(again).items() if s > cut}
    config = CONFIGS[name]
    ours, theirs = (FINEGATES.state(one.crafted, config) for one in (whole, again))
    assert ours and all(torch.equal(ours[key], theirs[key]) for key in ours)
    tensors = [[p for t in trained_roles(one.crafted).values() for _, p in t] for one in (whole, again)]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    wanted = whole.drawn[2 * cut :]
    assert len(again.drawn) == len(wanted) == 2 * (STEPS - cut)
    assert all(torch.equal(a, b) for a, b in zip(again.drawn, wanted))


def test_every_micro_batch_has_its_own_draw(uncut):
    name, whole = uncut
    if name == "a rival":
        assert not any(drawn.any() for drawn in whole.drawn)
        return
    learning = whole.drawn[2:16]
    assert all(drawn.any() for drawn in learning)
    assert len({tuple(drawn[:4].tolist()) for drawn in learning}) == len(learning)


@pytest.mark.parametrize("name", ["structured", "paper"])
def test_recomputed_activations_change_nothing(tmp_path, name):
    plain, saving = tuner(tmp_path / "a", name), tuner(tmp_path / "b", name, checkpointing=True)
    plain.train()
    saving.train()
    for step, loss in losses(plain).items():
        assert losses(saving)[step] == pytest.approx(loss, abs=1e-6), step
