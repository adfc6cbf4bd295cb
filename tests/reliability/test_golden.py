"""Promise 19: what earlier versions wrote opens today, and what later ones may write is refused in words."""

from __future__ import annotations

import shutil

import pytest

import sparsmith as sm
from sparsmith.app import load_recipe
from sparsmith.crafting.base_model import load_base
from sparsmith.recipe.schema import ModelSettings
from sparsmith.training.arguments import training_arguments
from sparsmith.training.saves import listed, step_of
from tests.kit.rows import RowDataset, pad_rows
from tests.kit.trials import golden


def test_every_golden_folder_opens_with_its_logits(tmp_path):
    tally = golden.opens(tmp_path)
    assert tally.whole, tally.failures
    assert tally.tried >= 3


def test_a_version_of_the_future_is_refused_in_words(tmp_path):
    tally = golden.futures(tmp_path)
    assert tally.whole, tally.failures


@pytest.mark.parametrize("version", golden.versions(), ids=lambda path: path.name)
def test_a_golden_run_goes_on_from_its_checkpoint(tmp_path, version):
    run = tmp_path / "run"
    shutil.copytree(version / "run", run)
    (checkpoint,) = listed(run / "checkpoints")
    recipe = load_recipe(run / "recipe.yaml", check_paths=False)
    base = load_base(ModelSettings(path=str(version / "base")))
    model = sm.craft(base, list(recipe.methods), seed=recipe.train.seed)
    args = training_arguments(recipe.train, tmp_path / "on", step_of(checkpoint) + 2)
    rows = RowDataset(40)
    tuner = sm.Tuner(model=model, args=args, train_dataset=rows, data_collator=pad_rows, moved_after=None)
    tuner.train(resume_from_checkpoint=str(checkpoint))
    assert tuner.state.global_step == step_of(checkpoint) + 2
    steps = {int(state["step"]) for state in tuner.optimizer.state.values()}
    assert steps == {tuner.state.global_step}, "the moments of the checkpoint were taken up"
