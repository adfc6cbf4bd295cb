"""PESC on a two-domain task, against the dense LoRA with the same LoRA: the added experts must buy something (spec test 21)."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.methods.base import LoraSettings
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.protocols.pesc import CONTROLS
from sparsmith.training import Objective
from tests.kit.pico import pico_model
from tests.kit.rows import pad_rows

BASE = {"num_experts": 4, "top_k": 2, "adapter_dim": 16, "adapter_scale": 1.0}
LORA = LoraSettings(r=2, alpha=4, dropout=0.0)


class TwoDomains(torch.utils.data.Dataset):
    """Six tokens, a separator, an answer. Domain 0: the tokens shifted by 7; domain 1: in reverse. The separator tells which."""

    ordered = True

    def __init__(self, count, seed):
        self.prompt = torch.randint(10, 90, (count, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.prompt)

    def __getitem__(self, index):
        prompt, domain = self.prompt[index], index % 2
        answer = (prompt - 10 + 7) % 80 + 10 if domain == 0 else prompt.flip(0)
        ids = torch.cat([prompt, torch.tensor([3 + domain]), answer])
        labels = ids.clone()
        labels[:7] = -100
        return {"input_ids": ids, "labels": labels, "domain": domain}


def tuned(control, tmp_path, steps):
    given = dict(BASE)
    if control == "dense":
        given.pop("top_k")
    model = sm.craft(pico_model("llama"), PescConfig(**{**given, **CONTROLS[control]}, lora=LORA), seed=0)
    args = TrainingArguments(
        output_dir=str(tmp_path / control),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 6),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tuner = sm.Tuner(
        model=model,
        args=args,
        train_dataset=TwoDomains(steps * 32, seed=0),
        data_collator=pad_rows,
        domains=("shift", "reverse"),
        moved_after=min(20, steps),
    )
    tuner.train()
    lines = [line for line in tuner.state.log_history if "loss" in line]
    return tuner, lines


def held_out(model):
    data = TwoDomains(128, seed=99)
    batch = pad_rows([data[i] for i in range(128)])
    with torch.no_grad():
        return Objective(model.eval())(**batch)["terms"]["task"].item()


@pytest.mark.long
def test_experts_beat_the_same_lora_alone_and_none_dies(tmp_path):
    sparse, lines = tuned("learned", tmp_path, 300)
    dense, _ = tuned("dense_lora", tmp_path, 300)
    assert held_out(sparse.crafted) < held_out(dense.crafted)
    assert lines[-1]["health/pesc/dead_experts"] == 0
    assert lines[-1]["term/task"] < lines[0]["term/task"]
    assert {"domain/shift", "domain/reverse", "term/pesc.balance"} <= set(lines[-1])


@pytest.mark.parametrize("control", [name for name in CONTROLS if name != "learned"])
def test_every_control_runs_and_reports(control, tmp_path):
    tuner, lines = tuned(control, tmp_path, 12)
    assert lines[-1]["term/task"] < lines[0]["term/task"]
    assert all(norm > 0 for norm in tuner.roles_move.result["value"].values())
    routed = control in ("random", "frozen", "hash", "dense")
    assert ("health/pesc/load_max" in lines[-1]) == routed
    assert ("term/pesc.balance" in lines[-1]) is False  # no control trains a router
