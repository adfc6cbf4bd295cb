"""What each rank of a data-parallel run does: 20 steps of PESC on a pico model. Run it under torchrun, or alone as one process.

torchrun --nproc-per-node 2 -m tests.kit.two_ranks OUT ROWS_PER_RANK
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.crafting.tensors import content_hash
from sparsmith.methods.base import LoraSettings
from sparsmith.methods.pesc.config import PescConfig
from tests.kit.pico import pico_model
from tests.kit.rows import RowDataset, pad_rows

# alpha 0: the balance loss is a mean over a micro-batch and not linear in it, so it differs when a batch is split over ranks
CONFIG = PescConfig(
    num_experts=8, top_k=1, adapter_dim=8, balance_alpha=0.0, path="masked", lora=LoraSettings(r=2, dropout=0.0)
)


def main(out: str, rows: int) -> None:
    torch.set_num_threads(1)
    model = sm.craft(pico_model("llama"), CONFIG, seed=1)
    args = TrainingArguments(
        output_dir=f"{out}/run",
        max_steps=20,
        per_device_train_batch_size=rows,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
    )
    tuner = sm.Tuner(model=model, args=args, train_dataset=RowDataset(80), data_collator=pad_rows)
    tuner.train()
    weights = [pair for role in trained_roles(model).values() for pair in role]
    record = {
        "losses": [line["loss"] for line in tuner.state.log_history if "loss" in line],
        "hash": content_hash(weights),
        "dead": [line["health/pesc/dead_experts"] for line in tuner.state.log_history if "loss" in line],
    }
    Path(out, f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
