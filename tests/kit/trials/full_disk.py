"""Promise 4: a disk without room stops a run in one line, before its first step where that can be foreseen, and harms no checkpoint."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsmith import durable
from sparsmith.errors import CheckpointError
from sparsmith.training.saves import PREFIX, listed
from tests.kit import forks
from tests.kit.small_run import METHODS, make_recipe
from tests.kit.tally import Tally
from tests.kit.trials.kills import bits_of

SIZES = (0.5, 1.5, 2.5)
"""Room in checkpoints."""


def can_mount() -> bool:
    """Whether this process may mount a file system of a given size."""
    return os.geteuid() == 0 and Path("/proc/mounts").exists()


def run(folder: Path) -> Tally:
    """Every method at full size."""
    tally = Tally()
    for method in METHODS:
        tally.add(disk_trial(folder / method, method))
    return tally


def disk_trial(folder: Path, method: str = "pesc", *, sizes: Sequence[float] = SIZES) -> Tally:
    """For each size: a disk that is too small from the start, and one that another process fills after the first save."""
    recipe = make_recipe(folder, method)
    uncut = folder / "uncut"
    assert forks.run(["tune", recipe, f"output={uncut}"], folder / "uncut.log") == 0
    wanted = bits_of(uncut)
    size = sum(file.stat().st_size for file in listed(uncut / "checkpoints")[-1].rglob("*") if file.is_file())
    tally = Tally(figures={"checkpoint_bytes": size})
    for share in sizes:
        with mounted(folder / f"small-{share}", int(size * share)) as disk:
            log = folder / f"small-{share}.log"
            code = forks.run(["tune", recipe, f"output={disk / 'run'}"], log)
            text = log.read_text()
            said = "bytes free" in text and str(disk) in text and "Traceback" not in text
            early = not (disk / "run" / "metrics.jsonl").exists()
            partial = _partial(disk / "run")
            what = (
                f"{method}, {share} checkpoints: exit {code}, {partial} partial, before step 1: {early}; {text[-200:]}"
            )
            tally.case(code == 9 and said and early and not partial, what)
        with mounted(folder / f"filled-{share}", 40 * size) as disk:
            run, log = disk / "run", folder / f"filled-{share}.log"
            code = forks.run(["tune", recipe, f"output={run}"], log, fill_after_save, disk, int(size * share) - size)
            text, partial = log.read_text(), _partial(run)
            said = "bytes free" in text and "Traceback" not in text
            (disk / "ballast").unlink()
            whole = [path.name for path in listed(run / "checkpoints")]
            again = forks.run(["tune", recipe, f"output={run}"], log)
            held = code == 9 and said and not partial and bool(whole) and again == 0 and bits_of(run) == wanted
            what = f"{method}, filled to {share}: exit {code}, {partial} partial, whole {whole}, resumed {again}; {text[-200:]}"
            tally.case(held, what)
    return tally


@contextmanager
def mounted(place: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes in memory."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill_after_save(disk: Path, room: int) -> None:
    """In the child: after the first checkpoint, leave `room` bytes (at least a page) on the disk."""
    from sparsmith.training.tuner import Tuner

    save = Tuner._save_checkpoint

    def save_and_fill(self: Tuner, *given: object) -> None:
        save(self, *given)
        if not (disk / "ballast").exists():
            left = durable.free_bytes(disk) - max(room, 4096)
            with suppress(OSError), (disk / "ballast").open("wb") as file:
                file.write(b"\0" * left)

    Tuner._save_checkpoint = save_and_fill  # type: ignore[method-assign]


def _partial(run: Path) -> int:
    """Checkpoint folders that are there and not whole."""
    partial = 0
    for path in (run / "checkpoints").glob(f"{PREFIX}*"):
        try:
            durable.verify_folder(path)
        except CheckpointError:
            partial += 1
    return partial
