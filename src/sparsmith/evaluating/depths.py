"""A depth-elastic model measured at every depth, by the same measures: each depth is a model of its own (`crafting/slices.py`).

The full depth is measured first and once; the shallower ones are then also told how often they choose its token (`agreement`). Price: the
measures of a model of n blocks for every depth n.

Paper: Sorted LLaMA (arXiv 2309.08968) §4 reports every sub-model; agreement is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsmith import anatomy
from sparsmith.anatomy import views
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.errors import CheckpointError, UnsupportedAnatomy
from sparsmith.evaluating.agreement import Reference
from sparsmith.evaluating.evaluate import evaluate
from sparsmith.evaluating.result import EvalResult

if TYPE_CHECKING:
    from rich.table import Table

    from sparsmith.evaluating.rows import EvalSets


@dataclass(frozen=True)
class DepthResult:
    """One result per depth."""

    depths: dict[int, EvalResult]
    """Depth in blocks -> result, ascending; the last is the full depth, which has no `agreement`."""

    @property
    def full(self) -> EvalResult:
        """The result of the full depth."""
        return self.depths[max(self.depths)]

    def agreement(self, depth: int) -> float | None:
        """Mean over the domains of the share of tokens that the full depth would choose too; 1 for the full depth itself."""
        if depth == max(self.depths):
            return 1.0
        figure = self.depths[depth].overall.get("agreement")
        return None if figure is None else figure.value

    def to_json(self) -> dict[str, Any]:
        """Depth as text -> plain data: what `eval.json` holds under `depths`."""
        return {str(depth): result.to_json() for depth, result in self.depths.items()}

    def as_dict(self) -> dict[str, Any]:
        """The full depth's result as ever, and every depth's under `depths`."""
        return {**self.full.to_json(), "depths": self.to_json()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DepthResult:
        """The result that `to_json` wrote.

        Raises:
            CheckpointError: not such data.
        """
        if not isinstance(raw, Mapping) or not raw or not all(str(key).isdecimal() for key in raw):
            raise CheckpointError(
                "eval result by depth", "no depths", "a result for every depth", "Run the evaluation again."
            )
        return cls({int(key): EvalResult.from_json(raw[key]) for key in sorted(raw, key=int)})

    def table(self, title: str = "") -> Table:
        """One column per depth."""
        from sparsmith.evaluating.show import result_table

        named = {f"depth {depth}": result for depth, result in self.depths.items()}
        return result_table(named, title=title or "Every depth")


def elastic_depths(model: nn.Module) -> tuple[int, ...]:
    """The depths at which a model may be read out; () for one that has a single depth or is of a family without an anatomy."""
    try:
        found = depths_of(model)
    except UnsupportedAnatomy:
        return ()
    return found if len(found) > 1 else ()


def evaluate_depths(
    model: nn.Module, tokenizer: Any, eval_sets: EvalSets, *, depths: Sequence[int] | None = None, **options: Any
) -> DepthResult:
    """Measure a model at every depth.

    Args:
        model: a causal LM; left as it is.
        depths: in blocks; default: those the model was tuned for. Others are read out through the untouched norm and head, as those of a
            base are. The full depth is always measured.
        options: of `evaluate`.
    """
    layers = len(anatomy.blocks(model))
    wanted = sorted({*(depths if depths is not None else depths_of(model)), layers})
    reference = Reference()
    full = evaluate(model, tokenizer, eval_sets, reference=reference, **options)
    inner = {
        depth: evaluate(_read_out(model, depth), tokenizer, eval_sets, reference=reference, **options)
        for depth in wanted[:-1]
    }
    return DepthResult({**inner, layers: full})


def _read_out(model: nn.Module, depth: int) -> Any:
    return at_depth(model, depth) if depth in depths_of(model) else views.first_blocks(model, depth)
