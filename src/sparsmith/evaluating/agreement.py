"""Agreement: the share of labelled positions at which a sub-model's most likely token is that of the full depth."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sparsmith.bootstrap import RowScores


@dataclass
class Reference:
    """The most likely tokens of the model that is measured first, set by set; models measured later are held against them."""

    chosen: dict[str, list[Tensor]] = field(default_factory=dict)
    """Set -> row -> (labels of the row,) int64."""

    def held_against(self, name: str, chosen: list[Tensor]) -> dict[str, RowScores]:
        """`agreement` of a set row by row (equal tokens, labelled tokens); nothing for the first model, whose choices are kept."""
        if name not in self.chosen:
            self.chosen[name] = chosen
            return {}
        pairs = list(zip(self.chosen[name], chosen, strict=True))
        return {
            "agreement": RowScores(
                tuple(float((ours == theirs).sum()) for ours, theirs in pairs), tuple(float(len(t)) for t, _ in pairs)
            )
        }
