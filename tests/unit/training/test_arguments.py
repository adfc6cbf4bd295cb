"""Recipe settings as Trainer arguments, and what the Trainer would only complain of later."""

from __future__ import annotations

import pytest

from sparsmith.errors import EnvironmentFault, MethodError
from sparsmith.recipe.schema import TrainSettings
from sparsmith.training.arguments import training_arguments


def made(tmp_path, **settings):
    return training_arguments(TrainSettings(steps=100, **settings), tmp_path, 100)


def test_rows_per_step_and_schedule(tmp_path):
    arguments = made(tmp_path, batch_size=12, micro_batch_size=4, warmup=0.1, save_every=25, keep=3, clip=None)
    assert arguments.per_device_train_batch_size == 4 and arguments.gradient_accumulation_steps == 3
    assert arguments.warmup_steps == 10 and arguments.save_steps == 25 and arguments.save_total_limit == 3
    assert arguments.max_grad_norm == 0 and arguments.remove_unused_columns is False
    assert arguments.train_sampling_strategy == "sequential"


def test_checkpointing_is_non_reentrant(tmp_path):
    arguments = made(tmp_path, gradient_checkpointing=True)
    assert arguments.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_a_tracker_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EnvironmentFault, match="no_such_tracker"):
        made(tmp_path, report_to=("no_such_tracker",))


def test_an_unknown_optimiser_is_named(tmp_path):
    with pytest.raises(MethodError, match="no_such_optimizer"):
        made(tmp_path, optimizer="no_such_optimizer")


def test_one_process_on_a_machine_with_several_gpus_uses_one(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: getattr(self, "_n_gpu", 8)))
    monkeypatch.setattr(
        "transformers.TrainingArguments._setup_devices", property(lambda self: setattr(self, "_n_gpu", 8))
    )
    assert made(tmp_path, batch_size=12)._n_gpu == 1
