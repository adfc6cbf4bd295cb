"""Resume: a run cut after a save goes on to the same bits as the uncut one (dropout, accumulation and routing included)."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.errors import CheckpointMismatch
from sparsmith.methods.base import LoraSettings
from tests.kit.pico import pico_model
from tests.kit.rows import RowDataset, pad_rows

CONFIG = {"num_experts": 4, "top_k": 2, "adapter_dim": 8, "path": "masked", "lora": LoraSettings(r=4, dropout=0.1)}


def tuner(folder, steps=12, **changes):
    model = sm.craft(pico_model("llama"), sm.PescConfig(**{**CONFIG, **changes}), seed=3)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="steps",
        save_steps=6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return sm.Tuner(model=model, args=args, train_dataset=RowDataset(20), data_collator=pad_rows)


def losses(one):
    return {line["step"]: line["loss"] for line in one.state.log_history if "loss" in line}


def weights(one):
    return {name: p.detach().clone() for role in trained_roles(one.crafted).values() for name, p in role}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    one = tuner(tmp_path_factory.mktemp("uncut"))
    one.train()
    return one


def test_resumed_run_equals_the_uncut_one_bit_for_bit(uncut, tmp_path):
    checkpoint = f"{uncut.args.output_dir}/checkpoint-6"
    again = tuner(tmp_path)
    again.train(resume_from_checkpoint=checkpoint)
    assert again.state.global_step == 12
    mine, wanted = weights(again), weights(uncut)
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    series, whole = losses(again), losses(uncut)
    assert {step: series[step] for step in range(7, 13)} == {step: whole[step] for step in range(7, 13)}


def test_the_same_seed_gives_the_same_bits(uncut, tmp_path):
    again = tuner(tmp_path)
    again.train()
    assert losses(again) == losses(uncut)
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(uncut).values(), strict=True))


def test_a_checkpoint_of_other_settings_is_refused(uncut, tmp_path):
    with pytest.raises(CheckpointMismatch, match="adapter_scale"):
        tuner(tmp_path, adapter_scale=0.5).train(resume_from_checkpoint=f"{uncut.args.output_dir}/checkpoint-6")


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_saved_that_was_not_asked_for(tmp_path, asked):
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    model = sm.craft(pico_model("llama"), sm.PescConfig(**CONFIG), seed=3)
    rows = {"train_dataset": RowDataset(20), "data_collator": pad_rows}
    sm.Tuner(model=model, args=args, save_at_end=asked, moved_after=None, **rows).train()
    assert [path.name for path in tmp_path.iterdir()] == (["checkpoint-2"] if asked else [])
