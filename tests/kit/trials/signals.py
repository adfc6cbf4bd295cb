"""Promise 18: SIGTERM or SIGINT at any phase ends a run in order, and the same command goes on to the uncut run's bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsmith.training.saves import listed, step_of
from tests.kit import forks
from tests.kit.small_run import METHODS, make_recipe
from tests.kit.tally import Tally
from tests.kit.trials.kills import bits_of

PHASES = ("first batch", "step", "evaluation", "save", "before", "after")
STEP = 7
"""The step in which a signal comes; no save falls on it."""


def run(folder: Path) -> Tally:
    """Every method at full size."""
    tally = Tally()
    for method in METHODS:
        tally.add(signal_trial(folder / method, method, each=3))
    return tally


def signal_trial(folder: Path, method: str = "pesc", *, each: int, phases: Sequence[str] = PHASES) -> Tally:
    """`each` signals of both kinds in every phase, and a second signal right after a first one."""
    recipe = make_recipe(folder, method)
    uncut = folder / "uncut"
    assert forks.run(["tune", recipe, f"output={uncut}"], folder / "uncut.log") == 0
    wanted, tally = bits_of(uncut), Tally()
    slowest = 0.0
    for phase in phases:
        for number in (signal.SIGTERM, signal.SIGINT):
            for turn in range(each):
                run = folder / f"{phase}-{number}-{turn}".replace(" ", "_")
                command, log, sent = (
                    ["tune", recipe, f"output={run}"],
                    run.with_suffix(".log"),
                    run.with_suffix(".sent"),
                )
                code = forks.run(command, log, send_in, phase, int(number), turn, sent)
                late = time.time() - float(sent.read_text())
                slowest = max(slowest, late)
                what = f"{method}, {signal.Signals(number).name} in {phase}"
                steps = [step_of(path) for path in listed(run / "checkpoints")]
                log_text = log.read_text(encoding="utf-8")
                fault = _fault(phase, code, number, steps, log_text, turn)
                code = forks.run(command, log)
                if code or bits_of(run) != wanted:
                    fault = fault or f"resumed with exit {code} to other bits"
                tally.case(not fault, f"{what}: {fault}")
    for number in (signal.SIGTERM, signal.SIGINT) * each:
        tally.case(*_second_signal(folder, recipe, number))
    tally.figures = {"slowest_end_after_signal_seconds": round(slowest, 2)}
    return tally


def _fault(phase: str, code: int, number: int, steps: list[int], log: str, turn: int) -> str:
    """What is wrong with how the run ended."""
    if code != 128 + number:
        return f"exit {code}"
    if "Traceback" in log:
        return "a traceback"
    wanted = {"first batch": 1, "step": STEP + turn, "evaluation": 8, "save": 6}.get(phase)
    if wanted is not None and wanted not in steps:
        return f"no whole checkpoint of step {wanted}, only of {steps}"
    return ""


def _second_signal(folder: Path, recipe: Path, number: int) -> tuple[bool, str]:
    """While the first waits for a step that does not end, the second must not wait."""
    run = folder / f"second-{number}-{time.monotonic_ns()}"
    child = forks.start(["tune", recipe, f"output={run}"], run.with_suffix(".log"), hang_in_step, STEP)
    child.saw("in the step")
    os.kill(child.process.pid, number)
    time.sleep(0.3)
    begun = time.monotonic()
    os.kill(child.process.pid, number)
    code = child.wait(10)
    late = time.monotonic() - begun
    return code == 128 + number and late < 1, f"second {signal.Signals(number).name}: exit {code} after {late:.1f} s"


def send_in(phase: str, number: int, turn: int, sent: Path) -> None:
    """In the child: send the signal to this process in the middle of a phase, once."""
    from sparsmith import durable
    from sparsmith.app import tuning
    from sparsmith.evaluating import loss
    from sparsmith.training.tuner import Tuner

    done = False

    def send() -> None:
        nonlocal done
        if not done:
            done = True
            sent.write_text(str(time.time()))
            os.kill(os.getpid(), number)

    micro_batches = 0

    def in_micro_batch(*_: Any) -> None:
        nonlocal micro_batches
        micro_batches += 1
        if phase == "evaluation" and micro_batches == 16:  # the last micro-batch before the evaluation at step 8
            _before(loss, "_batch", send)
        if (phase == "first batch" and micro_batches == 1) or (phase == "step" and micro_batches == 2 * (STEP + turn)):
            send()
        if phase == "save" and micro_batches == 10:  # the last one before the save of step 5
            _before(durable, "seal", send)

    if phase == "before":
        _before(tuning._Session, "craft", send)
    if phase == "after":
        _before(tuning._Session, "finish", send)
    _before(Tuner, "training_step", in_micro_batch)


def hang_in_step(step: int) -> None:
    """In the child: the second micro-batch of `step` takes a minute."""
    from sparsmith.training.tuner import Tuner

    micro_batches = 0

    def wait() -> None:
        nonlocal micro_batches
        micro_batches += 1
        if micro_batches == 2 * step:
            print("in the step", flush=True)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.05)

    _before(Tuner, "training_step", wait)


def _before(owner: Any, name: str, act: Any) -> None:
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        act()
        return function(*args, **kwargs)

    setattr(owner, name, call)
