"""What a run's folder holds, by name: the one place where these names stand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsmith.durable import read_json
from sparsmith.errors import UsageError


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


def open_run(path: str | Path) -> RunFolder:
    """The run in that folder.

    Raises:
        UsageError: there is none.
    """
    if not is_run(path):
        raise UsageError(
            str(path), "no recipe.yaml", "the folder of a run", "Give the `output` folder of `sparsmith tune`."
        )
    return RunFolder(Path(path))
