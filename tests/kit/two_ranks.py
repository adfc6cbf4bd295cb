"""What each rank of a data-parallel run does: 12 steps of a method on a pico model, as one of several processes or alone.

Each rank leaves its figures in OUT/LABEL-rank<N>.json. The launchers that users start (torchrun, accelerate) are tried on a whole recipe:
`trials.ranks`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

import sparsmith as sm
from sparsmith import ranks
from sparsmith.crafting.gathered import reshard
from sparsmith.methods.base import LoraSettings
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import gates_of
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.methods.soft.config import SoftConfig
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.ops.shards import part, whole
from tests.kit import forks
from tests.kit.cases import base_for
from tests.kit.rows import RowDataset, pad_rows

STEPS = 12
HEALTH, DEAD = ("health/pesc/load", "health/soft/loss_at", "health/upcycle/"), "health/pesc/dead_experts"
BALANCE = ("term/pesc.balance", "term/upcycle.balance")
# the balance loss is on: its counts are summed over the ranks, so it must not differ either
CONFIG = PescConfig(
    num_experts=8, top_k=1, adapter_dim=8, balance_alpha=0.05, path="masked", lora=LoraSettings(r=2, dropout=0.0)
)
_SOFT: dict[str, Any] = {"exits": (1, 2, 4), "ce": {"chunk": 8}}
_GATES: dict[str, Any] = {"lora": {"r": 2, "dropout": 0.0}}
_LEVEL: dict[str, Any] = {"lr": 0.6, "start": "level", "noise_sigma": 0.1}
_SHORT: dict[str, Any] = {**_GATES, "schedule": {"hold": 0.1, "warmup": 0.2, "settle_at": 0.7}}
_PAPER: dict[str, Any] = {**_GATES, "layout": "paper", "gates": {"lr": 0.6}}
METHODS = {
    "pesc": CONFIG,
    "soft": SoftConfig(**_SOFT, weights="linear"),
    "soft, tied": SoftConfig(**{**_SOFT, "exits": (2, 4)}),
    "soft, KL": SoftConfig(**_SOFT, kl={"weight": 0.5}),
    "soft LoRA": SoftConfig(**_SOFT, tune="lora", lora=LoraSettings(r=2, dropout=0.0)),
    "soft, sandwich": SoftConfig(**_SOFT, schedule="sandwich"),
    "soft, sampled": SoftConfig(**_SOFT, schedule="sampled"),
    "soft, layer dropout": SoftConfig(**_SOFT, layer_dropout=0.5),
    "soft, frozen trunk": SoftConfig(**_SOFT, trunk="frozen"),
    "soft, frozen trunk, sandwich": SoftConfig(**_SOFT, trunk="frozen", schedule="sandwich"),
    "finegates": FineGatesConfig(**_SHORT, gates=_LEVEL),
    "finegates, paper": FineGatesConfig(**_PAPER),
    "finegates, no noise": FineGatesConfig(**_SHORT, gates={**_LEVEL, "noise_sigma": 0.0}),
    "finegates, by importance": FineGatesConfig(**_SHORT, gates={"lr": 0.6}),
    "finegates, paper, no noise": FineGatesConfig(**_PAPER, paper={"noise_sigma": 0.0}),
    "expert choice": UpcycleConfig(experts=4, moe={"router": "expert_choice", "z_coef": 0.05}),  # type: ignore[arg-type]
    "upcycle": UpcycleConfig(experts=4, moe={"balance_coef": 0.05}),
    "upcycle, lora": UpcycleConfig(experts=4, tune="lora", lora={"r": 2, "dropout": 0.0}, moe={"balance_coef": 0.05}),
}
"""A later method joins by an entry here."""


class StopAt(TrainerCallback):
    """Ends the loop early, as a stopped run does: the schedule stays that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


def tune(
    run: str,
    *,
    method: str = "pesc",
    sharded: bool = False,
    stop: int = STEPS,
    save: int = STEPS,
    base: str = "float32",
) -> dict:
    """12 steps of four rows in a run's folder, gone on with where it holds a checkpoint; the figures of this rank.

    Args:
        method: one of `METHODS`.
        sharded: FSDP2 instead of DDP, where there are several processes.
        stop: end after that step.
        save: steps between checkpoints.
        base: number type of the frozen base; the trained tensors are float32 beside it.
    """
    os.environ.update({"ACCELERATE_USE_FSDP": "true" if sharded else "false", "FSDP_VERSION": "2"})
    family = "gemma2" if method == "soft, tied" else "llama"
    model = sm.craft(base_for(METHODS[method], family, dtype=getattr(torch, base)), METHODS[method], seed=1)
    args = TrainingArguments(
        output_dir=run,
        max_steps=STEPS,
        per_device_train_batch_size=4 // ranks.world(),
        learning_rate=5e-3,
        max_grad_norm=0.3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="steps",
        save_steps=save,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if ranks.world() > 1 else None,
    )
    tuner = sm.Tuner(
        model=model, args=args, train_dataset=RowDataset(80), data_collator=pad_rows, callbacks=[StopAt(stop)]
    )
    tuner.train(resume_from_checkpoint=True if any(Path(run).glob("checkpoint-*")) else None)
    reshard(model)
    lines = [line for line in tuner.state.log_history if "loss" in line]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {
        "losses": {str(line["step"]): line["loss"] for line in lines},
        "balance": {str(line["step"]): line[key] for line in lines for key in BALANCE if key in line},
        "norms": {str(line["step"]): float(line["grad_norm"]) for line in lines},
        "health": {str(line["step"]): {k: v for k, v in line.items() if k.startswith(HEALTH)} for line in lines},
        "dead": {str(line["step"]): line[DEAD] for line in lines if DEAD in line},
        "weights": {name: whole(p.detach()).double().reshape(-1).tolist() for name, p in trained},
        "noise": {name: gate.noise.tolist() for name, gate in gates_of(model)},
        "thresholds": {n: b.tolist() for n, b in model.named_buffers() if n.endswith(".thresholds")},
        "parameter_bytes": sum(part(p).nbytes for p in model.parameters()),
    }


def pico_runs(out: Path, processes: int, **runs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """LABEL={settings of `tune`}, one run after the other in so many processes. LABEL -> what each rank has left.

    Raises:
        RuntimeError: a process ended with a fault; the end of what it said.
    """
    jobs = [{"label": label, "settings": {**one, "run": str(one["run"])}} for label, one in runs.items()]
    forks.ranks(as_rank, (out, jobs), out, processes)
    return {
        label: [json.loads((out / f"{label}-rank{rank}.json").read_text()) for rank in range(processes)]
        for label in runs
    }


def as_rank(rank: int, out: Path, jobs: list[dict[str, Any]]) -> None:
    """Several runs, one after the other, in one start of the processes: starting them costs more than a pico run."""
    torch.set_num_threads(1)
    ranks.start()
    for job in jobs:
        figures = tune(**job["settings"])
        (out / f"{job['label']}-rank{rank}.json").write_text(json.dumps(figures))
    ranks.wait()
    ranks.stop()
