"""The selection split: rows cut from the training sources, by which the best point of a run is chosen.

They are drawn from the stream `data.selection.<source>` of the run's seed, from each source its share, and never trained on. Evaluation
sources give none, so that no row that is reported on has helped to choose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsmith.data.evalsets import EvalRow, EvalSet
from sparsmith.data.prepare import TokenSet
from sparsmith.errors import DataError
from sparsmith.recipe.schema import EvalSource, SelectSettings
from sparsmith.seeds import numpy_generator


def cut_selection(
    sets: Sequence[TokenSet], settings: SelectSettings, seed: int, domains: Sequence[str]
) -> dict[str, EvalSet]:
    """Take the rows out of the sets and return them, by source.

    Args:
        sets: of the training sources; their `kept` and `counts` are changed.
        domains: of the run, in their order.

    Raises:
        DataError: too few rows for one.
    """
    total = sum(map(len, sets))
    share = min(settings.share, settings.max_rows / total)
    found = {}
    for one in sets:
        count = int(len(one) * share)
        order = numpy_generator(seed, f"data.selection.{one.name}").permutation(len(one))
        chosen = np.sort(order[:count])
        if count:
            found[one.name] = _as_eval_set(one, chosen, domains)
        one.take_out(chosen, "selection")
    if not found:
        raise DataError(
            "train.select",
            f"no row: {share:.3g} of {total}",
            "at least one row to select by",
            "Raise train.select.share, or give more training rows.",
        )
    return found


def _as_eval_set(tokens: TokenSet, chosen: np.ndarray, domains: Sequence[str]) -> EvalSet:
    domain = tokens.counts["domain"]
    rows = [
        EvalRow(
            place=tokens.place(index),
            prompt="",
            prompt_ids=[],
            completion="",
            input_ids=tokens.row(index)[0].tolist(),
            labels=[],
            label=tokens.label(index),
        )
        for index in chosen.tolist()
    ]
    source = EvalSource.model_construct(name=tokens.name, domain=domain, path=tokens.name)
    counts = {"kept": len(rows), "domain": domain}
    return EvalSet(tokens.name, domain, list(domains).index(domain), source, rows, counts, [], tokens.fingerprints)
