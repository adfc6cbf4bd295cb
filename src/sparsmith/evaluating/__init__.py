"""How good a model is: held-out loss, rank classification, exact match, each with its interval."""

from __future__ import annotations

from sparsmith.bootstrap import Figure, RowScores, paired_differences
from sparsmith.evaluating.answers import extract, normalise
from sparsmith.evaluating.apart import ApartResult, CleanAndSeen, clean_and_seen
from sparsmith.evaluating.depths import DepthResult, elastic_depths, evaluate_depths
from sparsmith.evaluating.evaluate import evaluate
from sparsmith.evaluating.exact_match import exact_match, write_answers
from sparsmith.evaluating.loss import heldout_loss
from sparsmith.evaluating.normalised import Headline, TaskScore, headline, headline_sheet, normalised, suite_score
from sparsmith.evaluating.questions import alias_match, strict_match, word_overlap
from sparsmith.evaluating.rank import rank_classification
from sparsmith.evaluating.result import EvalResult
from sparsmith.evaluating.samples import sample_answers, side_by_side
from sparsmith.evaluating.sheet import Sheet, signed
from sparsmith.evaluating.show import result_table

__all__ = [
    "ApartResult",
    "CleanAndSeen",
    "DepthResult",
    "EvalResult",
    "Figure",
    "Headline",
    "RowScores",
    "Sheet",
    "TaskScore",
    "alias_match",
    "clean_and_seen",
    "elastic_depths",
    "evaluate",
    "evaluate_depths",
    "exact_match",
    "extract",
    "headline",
    "headline_sheet",
    "heldout_loss",
    "normalise",
    "normalised",
    "paired_differences",
    "rank_classification",
    "result_table",
    "sample_answers",
    "side_by_side",
    "signed",
    "strict_match",
    "suite_score",
    "word_overlap",
    "write_answers",
]
