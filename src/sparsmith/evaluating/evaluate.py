"""The top call: every metric that each set asks for, on one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.bootstrap import RESAMPLES, RowScores
from sparsmith.errors import DataError
from sparsmith.evaluating.agreement import Reference
from sparsmith.evaluating.batching import BATCH_TOKENS
from sparsmith.evaluating.classify import class_scores
from sparsmith.evaluating.exact_match import exact_match
from sparsmith.evaluating.loss import OnBatch, heldout_loss
from sparsmith.evaluating.rank import rank_classification
from sparsmith.evaluating.result import EvalResult
from sparsmith.evaluating.rows import rows_fingerprint, sets_of

if TYPE_CHECKING:
    from sparsmith.evaluating.rows import EvalSets


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    eval_sets: EvalSets,
    *,
    seed: int = 42,
    resamples: int = RESAMPLES,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: OnBatch | None = None,
    domains: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
    progress: Callable[[str, str], None] | None = None,
    reference: Reference | None = None,
) -> EvalResult:
    """Measure the model on every set.

    Args:
        model: a causal LM or a sequence classifier, base or crafted; left in the mode it was in. Of a classifier `loss` brings `accuracy`.
        tokenizer: used by exact match alone; may be None where it is not asked for.
        eval_sets: sets of `sparsmith.data`, each with `source.metrics`.
        seed: of the bootstrap.
        batch_tokens: tokens of one forward, padding included.
        on_batch: called right before each forward of the held-out loss, with the contract's `Batch`.
        domains: the domains in the order of their indices in `Batch.domain`; default: the sets' domains in their order.
        metrics: measure only these, whatever the sets ask for.
        progress: called with (set, metric) before each measure.
        reference: the choices of tokens that this model's are held against under `agreement`, in the forward of the loss; an empty one
            is filled with this model's.

    Raises:
        DataError: no sets, or a row that cannot be scored. ProofError: a figure that is not finite.
    """
    sets = sets_of(eval_sets)
    if not sets:
        raise DataError("data.eval", "no evaluation sets", "at least one", "Name one under `data.eval` of the recipe.")
    known = list(domains) or list(dict.fromkeys(eval_set.domain for eval_set in sets))
    rows: dict[str, dict[str, RowScores]] = {}
    answers: dict[str, tuple[str, ...]] = {}
    for eval_set in sets:
        scores = rows.setdefault(eval_set.name, {})
        for metric in eval_set.source.metrics:
            if metrics is not None and metric not in metrics:
                continue
            if progress is not None:
                progress(eval_set.name, metric)
            if metric == "loss" and anatomy.task_of(model) == anatomy.SEQ_CLS:
                scores.update(
                    class_scores(model, eval_set, batch_tokens=batch_tokens, on_batch=on_batch, domains=known)
                )
            elif metric == "loss":
                chosen: list[Tensor] | None = None if reference is None else []
                scores["loss"] = heldout_loss(
                    model, eval_set, batch_tokens=batch_tokens, on_batch=on_batch, domains=known, chosen=chosen
                )
                if reference is not None and chosen is not None:
                    scores.update(reference.held_against(eval_set.name, chosen))
            elif metric == "rank":
                scores.update(rank_classification(model, eval_set, batch_tokens=batch_tokens))
            else:
                hits, written = exact_match(model, tokenizer, eval_set, batch_tokens=batch_tokens)
                scores.update(hits)
                answers[eval_set.name] = written.texts
    return EvalResult.of(
        rows,
        {eval_set.name: eval_set.domain for eval_set in sets},
        seed=seed,
        resamples=resamples,
        fingerprints={eval_set.name: rows_fingerprint(eval_set) for eval_set in sets},
        answers=answers,
    )
