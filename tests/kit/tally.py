"""What a trial counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Cases tried, cases where the promise held, and a line for each case where it did not."""

    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """Whatever else the trial measured, for the table and the JSON."""

    def case(self, held: bool, what: str) -> None:
        """Count one case; `what` names it where the promise did not hold."""
        self.tried += 1
        if held:
            self.held += 1
        else:
            self.failures.append(what)

    @property
    def whole(self) -> bool:
        """Something was tried, and the promise held in all of it."""
        return self.tried > 0 and self.held == self.tried

    def add(self, other: Tally) -> None:
        """Take another tally's cases in."""
        self.tried, self.held = self.tried + other.tried, self.held + other.held
        self.failures += other.failures
        self.figures |= other.figures
