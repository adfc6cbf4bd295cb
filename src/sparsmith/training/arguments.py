"""A recipe's `train` settings as the Trainer's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sparsmith import ranks
from sparsmith.errors import EnvironmentFault, MethodError
from sparsmith.recipe.schema import TrainSettings


def training_arguments(settings: TrainSettings, folder: Path, steps: int) -> TrainingArguments:
    """Arguments for `steps` optimiser steps that write their checkpoints below `folder`.

    Raises:
        MethodError: a setting that the Trainer refuses.
    """
    micro, accumulation = ranks.rows_per_rank(settings.batch_size, settings.micro_batch_size)
    half = _autocast(settings.precision)
    _check_trackers(settings.report_to)
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=micro,
            **_processes(),
            gradient_accumulation_steps=accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,
            warmup_steps=0 if settings.schedule == "constant" else round(settings.warmup * steps),
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            max_grad_norm=settings.clip or 0.0,
            optim=settings.optimizer,
            bf16=half == "bfloat16",
            fp16=half == "float16",
            activation_checkpointing=settings.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
            save_strategy="steps" if settings.save_every else "no",
            save_steps=settings.save_every or 500,
            save_total_limit=settings.keep,
            logging_steps=settings.log_every,
            seed=settings.seed,
            data_seed=settings.seed,
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            eval_strategy="no",
            log_level="error",
        )
        # started once on a machine with several GPUs, the Trainer would copy the model to each (DataParallel) and multiply the batch
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments
    except (ValueError, ImportError) as fault:
        raise MethodError(
            "train",
            " ".join(str(fault).split())[:300],
            "settings that the Trainer accepts",
            "Change the setting named.",
        ) from fault


def _processes() -> dict[str, Any]:
    """On several CPU processes the backend must be named, or the Trainer would train each of them for itself."""
    if ranks.world() == 1:
        return {}
    common: dict[str, Any] = {"ddp_timeout": int(ranks.PATIENCE.total_seconds())}
    return common if ranks.on_cuda() else {**common, "use_cpu": True, "ddp_backend": "gloo"}


def _check_trackers(names: tuple[str, ...]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    known = get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise EnvironmentFault(
                "train.report_to",
                f"`{name}`",
                "a tracker that is installed here: " + (", ".join(known) or "none is"),
                "Install it (`pip install 'sparsmith[track]'` brings trackio), or leave it out.",
            )


def _autocast(precision: str) -> str:
    if precision != "auto":
        return precision
    return "bfloat16" if ranks.on_cuda() and torch.cuda.is_bf16_supported() else "float32"
