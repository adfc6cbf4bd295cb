"""Win, lose, tie: answers of two systems to the same items, judged in both orders.

Paper: Sorted LLaMA (arXiv 2309.08968) §4 judges 170 items with PandaLM; its score is (W - L) / 170, the number of *items*, though the text
calls the denominator the number of ties. A judge may favour a place, so every item is judged twice, each verdict counting one half.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsmith.errors import DataError

Winner = Literal["first", "second", "tie"]
Judge = Callable[[str, str, str], Winner]
"""(prompt, first answer, second answer) -> which is better."""


@dataclass(frozen=True)
class Verdict:
    """One judgement of two answers in one order. A system is written `arm@depth`, such as `soft@4`."""

    item: str
    first: str
    second: str
    winner: Winner
    seed: int = 0


@dataclass(frozen=True)
class Tally:
    """Items won, lost and tied by the first system; halves where the two orders disagree."""

    wins: float
    losses: float
    ties: float

    @property
    def items(self) -> float:
        return self.wins + self.losses + self.ties

    @property
    def score(self) -> float:
        """In [-1, 1]; 0 = as good."""
        return score(self.wins, self.losses, self.items)

    def __str__(self) -> str:
        return f"{self.wins:g}/{self.losses:g}/{self.ties:g} ({self.score:+.3f})"


def score(wins: float, losses: float, items: float) -> float:
    """(W - L) / n."""
    return (wins - losses) / items


def tally(verdicts: Iterable[Verdict], system: str, rival: str) -> Tally | None:
    """What `system` won and lost against `rival`; None where the two were not judged.

    Raises:
        DataError: an item that was judged in one order only, or twice in the same.
    """
    orders: dict[tuple[str, int], dict[str, Winner]] = {}
    for verdict in verdicts:
        if {verdict.first, verdict.second} != {system, rival}:
            continue
        seen = orders.setdefault((verdict.item, verdict.seed), {})
        if verdict.first in seen:
            raise _order_fault(verdict.item, f"two verdicts with `{verdict.first}` first")
        seen[verdict.first] = verdict.winner
    counts = {"wins": 0.0, "losses": 0.0, "ties": 0.0}
    for (item, _), seen in orders.items():
        if len(seen) < 2:
            raise _order_fault(item, f"`{next(iter(seen))}` first alone")
        for first, winner in seen.items():
            won = (winner == "first") == (first == system)
            counts["ties" if winner == "tie" else "wins" if won else "losses"] += 0.5
    return Tally(**counts) if orders else None


def judge_both_orders(
    items: Sequence[tuple[str, str, str]], system: str, rival: str, judge: Judge, *, seed: int = 0
) -> list[Verdict]:
    """Both verdicts of a judge on each item.

    Args:
        items: (prompt, answer of `system`, answer of `rival`).
    """
    found = []
    for index, (prompt, ours, theirs) in enumerate(items):
        found.append(Verdict(str(index), system, rival, judge(prompt, ours, theirs), seed))
        found.append(Verdict(str(index), rival, system, judge(prompt, theirs, ours), seed))
    return found


def read_verdicts(path: str | Path) -> list[Verdict]:
    """A JSONL file of `{"item", "first", "second", "winner"[, "seed"]}`.

    Raises:
        DataError: names the line.
    """
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(str(path), f"no readable file ({fault})", "verdicts in JSONL", "Check the path.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_verdict(line, f"{path}:{number}"))
    return found


def _verdict(line: str, where: str) -> Verdict:
    expected = '{"item": .., "first": "soft@4", "second": "sft@6", "winner": "first", "second" or "tie"}'
    try:
        raw = json.loads(line)
        one = Verdict(str(raw["item"]), str(raw["first"]), str(raw["second"]), raw["winner"], int(raw.get("seed", 0)))
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise DataError(where, f"{type(fault).__name__}: {fault}", expected, "Mend the line.") from None
    if one.winner not in ("first", "second", "tie") or one.first == one.second:
        raise DataError(where, line.strip()[:100], expected, "Mend the line.")
    return one


def _order_fault(item: str, found: str) -> DataError:
    return DataError(
        f"verdicts: item {item}", found, "one verdict in each order", "Judge every item twice, with the places swapped."
    )
