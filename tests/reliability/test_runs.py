"""Promises 1, 2, 4, 6, 7 and 18 in short form; `python -m benchmarks.reliability` runs them whole."""

from __future__ import annotations

import json

import pytest

from sparsmith.cli import main
from sparsmith.training.saves import latest, listed, prune
from tests.kit.small_run import SAVE_EVERY, make_recipe
from tests.kit.trials.data_order import order_trial
from tests.kit.trials.full_disk import can_mount, disk_trial
from tests.kit.trials.kills import kill_trial
from tests.kit.trials.same_bits import same_bits_trial
from tests.kit.trials.signals import signal_trial


def test_a_killed_run_resumes_to_the_uncut_bits(tmp_path):
    same, whole = kill_trial(tmp_path, kills=2, aimed=2)
    assert same.whole, same.failures
    assert whole.whole, whole.failures


@pytest.mark.long
def test_a_killed_run_of_another_method_does_too(tmp_path):
    """Its draws of exits and blocks are those of the uncut run, the control beside it included."""
    same, whole = kill_trial(tmp_path, "soft", kills=1, aimed=2)
    assert same.whole, same.failures
    assert whole.whole, whole.failures


def test_a_killed_mixture_does_too(tmp_path):
    """Noise on the routers' input, dropout in the experts and the slots that are dropped are those of the uncut run."""
    same, whole = kill_trial(tmp_path, "upcycle", kills=1, aimed=2)
    assert same.whole, same.failures
    assert whole.whole, whole.failures


def test_a_signal_ends_a_run_in_order(tmp_path):
    tally = signal_trial(tmp_path, each=1, phases=("evaluation",))
    assert tally.whole, tally.failures


@pytest.mark.skipif(not can_mount(), reason="mounting a small file system needs root")
def test_a_full_disk_does_not_ruin_a_run(tmp_path):
    tally = disk_trial(tmp_path, sizes=(1.5,))
    assert tally.whole, tally.failures


def test_one_seed_one_set_of_bits(tmp_path):
    tally = same_bits_trial(tmp_path, processes=1)
    assert tally.whole, tally.failures


def test_the_order_of_rows_survives_a_resume(tmp_path):
    tally = order_trial(tmp_path, cases=12)
    assert tally.whole, tally.failures


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the small recipe."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, steps=10, eval_every=None)
    assert main(["tune", str(recipe)]) == 0
    return recipe


def failed(capsys, *arguments):
    """(exit code, what stands on stderr) of a command."""
    capsys.readouterr()
    return main([str(argument) for argument in arguments]), capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(finished, capsys):
    code, said = failed(capsys, "tune", finished)
    assert code == 2
    assert "a finished run" in said


def test_a_changed_recipe_is_refused_by_its_keys(finished, capsys):
    run = finished.parent / "run"
    (run / "report.html").unlink()
    code, said = failed(capsys, "tune", finished, "train.learning_rate=1.0e-3", "methods.0.top_k=1", "train.keep=3")
    assert code == 3
    assert said.count("as the run began") == 2
    assert "train.learning_rate" in said
    assert "methods.0.top_k" in said
    assert main(["tune", str(finished), "train.keep=3"]) == 0, "what changes no bit may change"


def test_the_newest_checkpoint_with_a_flipped_bit_is_passed_over(finished, capsys):
    checkpoints = finished.parent / "run" / "checkpoints"
    assert [path.name for path in listed(checkpoints)] == [f"checkpoint-{SAVE_EVERY}", f"checkpoint-{2 * SAVE_EVERY}"]
    file = listed(checkpoints)[-1] / "optimizer.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        faults = []
        assert latest(checkpoints, faults.append).name == f"checkpoint-{SAVE_EVERY}"
        assert [str(file) in str(fault) for fault in faults] == [True]
        (finished.parent / "run" / "report.html").unlink()
        (finished.parent / "run" / "run.json").unlink()
        code, said = failed(capsys, "tune", finished, "train.keep=3")
        assert code == 0
        assert "warning" in said and "optimizer.safetensors" in said and f"checkpoint-{SAVE_EVERY}" in said
    finally:
        if file.is_file():
            file.write_bytes(good)


def test_retention_counts_whole_checkpoints_and_keeps_the_last(finished):
    checkpoints = finished.parent / "run" / "checkpoints"
    (checkpoints / "checkpoint-99").mkdir(exist_ok=True)
    (checkpoints / "checkpoint-99" / "trainer_state.json").write_text(json.dumps({"global_step": 99}))
    before = listed(checkpoints)
    assert "checkpoint-99" not in [path.name for path in before]
    prune(checkpoints, 1)
    assert listed(checkpoints) == before[-1:]
    assert (checkpoints / "checkpoint-99").is_dir(), "what is not whole is not ours to delete"


def test_fewer_rows_than_a_batch_are_named(tmp_path, capsys):
    recipe = make_recipe(tmp_path)
    code, said = failed(capsys, "tune", recipe, "train.steps=null", "train.epochs=1.0", "train.batch_size=4096")
    assert code == 4
    assert "at least one batch of 4096" in said
