"""What a run's folder holds, by name: the one place where these names stand.

A run of several stages is a folder that holds `stages.json` and one whole run folder per stage, `stages/1-NAME`, `stages/2-NAME`, ...;
whoever asks for its run is given that of its last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsmith.durable import read_json, safe_name, write_json
from sparsmith.errors import CheckpointError, UsageError
from sparsmith.manifests import refuse_newer

_STAGES_FORMAT = 1


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def facts(self) -> Path:
        """Versions, machine, seed, times, tokens."""
        return self.root / "run.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def data(self) -> Path:
        """Domains, row counts, fingerprints."""
        return self.root / "data.json"

    @property
    def metrics(self) -> Path:
        """One line per log step and per evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def tables(self) -> Path:
        """Nested figures of the methods (expert load by layer and domain)."""
        return self.root / "tables.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval.json"

    @property
    def overlap(self) -> Path:
        """Where evaluation sets and training rows meet; only where `sparsmith data overlap --out` was asked to write it here."""
        return self.root / "overlap.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples.json"

    @property
    def proof(self) -> Path:
        return self.root / "proof.json"

    @property
    def bench(self) -> Path:
        """Speed and memory by depth and way, beside the base."""
        return self.root / "bench.json"

    @property
    def exits(self) -> Path:
        """Where tokens left at the confidence exits."""
        return self.root / "exits.json"

    @property
    def accounting(self) -> Path:
        """What a pruned model was counted to lose, what its form deletes, what its files measure."""
        return self.root / "accounting.json"

    @property
    def profile(self) -> Path:
        """Milliseconds per token by depth, which a budget in milliseconds reads."""
        return self.root / "soft_profile.json"

    @property
    def thresholds(self) -> Path:
        """Calibrated thresholds of the confidence exits."""
        return self.root / "soft_thresholds.json"

    @property
    def guard(self) -> Path:
        """The full model held against its control; only of a method that has one."""
        return self.root / "guard.json"

    @property
    def control(self) -> RunFolder:
        """The run of the control that was tuned beside this one."""
        return RunFolder(self.root / "control")

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def selection(self) -> Path:
        """Points that were measured to choose the best by, and its trained tensors; only with `train.select`."""
        return self.root / "selection"

    @property
    def model(self) -> Path:
        """The tuned model as a delta checkpoint."""
        return self.root / "model"

    @property
    def settled(self) -> Path:
        """Of a stage that another follows: the settled model, a full and proven checkpoint, from which the next starts."""
        return self.root / "settled"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def rejects(self) -> Path:
        return self.root / "rejects"

    def read(self, path: Path) -> Any:
        """A JSON file of the run, or None where this run did not write it."""
        return read_json(path) if path.is_file() else None

    @property
    def tuned(self) -> bool:
        """Whether the model is tuned, measured and saved; a run with a guard is finished only when that has been asked."""
        return self.facts.is_file()

    @property
    def finished(self) -> bool:
        return self.facts.is_file() and bool((self.read(self.facts) or {}).get("finished"))


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run."""
    return (Path(path) / "recipe.yaml").is_file()


@dataclass(frozen=True)
class StagesFolder:
    """Paths of a run of several stages."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, with every stage."""
        return self.root / "recipe.yaml"

    @property
    def index(self) -> Path:
        """Names of the stages, in their order."""
        return self.root / "stages.json"

    @property
    def report(self) -> Path:
        """The page of the whole, which links those of the stages."""
        return self.root / "report.html"

    def stage(self, number: int, name: str) -> RunFolder:
        """The run of a stage; `number` counts from 1."""
        return RunFolder(self.root / "stages" / f"{number}-{name}")

    def write(self, names: Sequence[str]) -> None:
        write_json(self.index, {"format": _STAGES_FORMAT, "stages": list(names)})

    def stages(self) -> list[RunFolder]:
        """The runs of all stages, begun or not.

        Raises:
            CheckpointError: `stages.json` is damaged, or names a folder outside of the run.
        """
        found = read_json(self.index)
        refuse_newer(str(self.index), found.get("format") if isinstance(found, dict) else None, _STAGES_FORMAT)
        names = found.get("stages") if isinstance(found, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                str(self.index), "no names of stages", "a list of them under `stages`", "Run `sparsmith tune` again."
            )
        for name in names:
            if "/" in safe_name(name, str(self.index)):
                raise CheckpointError(f"{self.index}: {name}", "a path", "the name of a stage", "Restore the file.")
        return [self.stage(number, name) for number, name in enumerate(names, 1)]


def is_staged(path: str | Path) -> bool:
    """Whether a folder is a run of several stages."""
    return StagesFolder(Path(path)).index.is_file()


def last_stage(path: str | Path) -> Path:
    """Of a run of several stages the folder of its last; every other path is given back as it is."""
    return StagesFolder(Path(path)).stages()[-1].root if is_staged(path) else Path(path)


def staged_root(path: str | Path) -> Path | None:
    """The run of several stages that a path lies in, or None."""
    place = Path(path).resolve()
    return next((one.parent for one in (place, *place.parents) if one.name == "stages" and is_staged(one.parent)), None)


def same_staged_root(one: str | Path, other: str | Path) -> Path | None:
    """The run of several stages that both paths lie in, or None: inside of it, paths are written relative, so that it can be moved."""
    root = staged_root(one)
    return root if root is not None and root == staged_root(other) else None


def open_run(path: str | Path) -> RunFolder:
    """The run in that folder; of several stages the last one's.

    Raises:
        UsageError: there is none, or the last stage has not begun.
    """
    if is_staged(path):
        last = RunFolder(last_stage(path))
        if not is_run(last.root):
            found = f"a run whose last stage, {last.root.name}, has not begun"
            raise UsageError(
                str(path), found, "a finished run", "Run `sparsmith tune` to its end, or name a stage's folder."
            )
        return last
    if not is_run(path):
        raise UsageError(
            str(path), "no recipe.yaml", "the folder of a run", "Give the `output` folder of `sparsmith tune`."
        )
    return RunFolder(Path(path))
