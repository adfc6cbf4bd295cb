"""Promise 6: one seed gives one set of bits, in every process and whatever work is done beside the training."""

from __future__ import annotations

from pathlib import Path

from tests.kit import forks
from tests.kit.small_run import METHODS, STEPS, make_recipe
from tests.kit.tally import Tally
from tests.kit.trials.kills import bits_of

BESIDE: tuple[tuple[str, ...], ...] = (
    (),
    ("train.eval_every=3",),
    ("train.eval_every=null", "train.save_every=null"),
    ("train.save_every=2", "train.keep=1"),
    ("train.log_every=7",),
)
"""Settings of work beside the training; the first is the recipe's own."""


def run(folder: Path) -> Tally:
    """Every method at full size."""
    tally = Tally()
    for method in METHODS:
        tally.add(same_bits_trial(folder / method, method, processes=5))
    return tally


def same_bits_trial(folder: Path, method: str = "pesc", *, processes: int) -> Tally:
    """The same recipe in `processes` processes, then once with each kind of side work: weights, and losses where they are logged, equal."""
    recipe, tally = make_recipe(folder, method), Tally()
    wanted = None
    for number, beside in enumerate((*[()] * processes, *BESIDE[1:])):
        run = folder / f"run{number}"
        code = forks.run(["tune", recipe, f"output={run}", *beside], run.with_suffix(".log"))
        bits = bits_of(run)
        wanted = wanted or bits
        same = code == 0 and len(wanted["losses"]) == STEPS and bits["weights"] == wanted["weights"]
        if "train.log_every=7" not in beside:
            same = same and bits["losses"] == wanted["losses"]
        tally.case(same, f"{method}, {' '.join(beside) or 'again'}: exit {code}, other bits")
    return tally
