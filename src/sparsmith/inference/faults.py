"""What can be wrong with a request for text."""

from __future__ import annotations

from typing import Any

from sparsmith import anatomy
from sparsmith.errors import EnvironmentFault, UsageError


class ModeConflict(UsageError):
    """More than one way of generating asked for, or a setting of a way that is not asked for."""


class BudgetTooSmall(UsageError):
    """No depth of the model is as cheap as asked."""


class ProfileMissing(EnvironmentFault):
    """No measured time per token for this device, number type and batch size."""


def require_text(model: Any, where: str = "generate") -> None:
    """Refuse a classifier where text is to be written, and an encoder-decoder, whose generation is not sparsmith's.

    Raises:
        UsageError: it is one.
    """
    if anatomy.task_of(model) == anatomy.SEQ2SEQ:
        raise UsageError(
            where,
            "an encoder-decoder, which writes to what another stack has read",
            "a decoder alone: depths, drafts and the timings of its text are of one stack",
            "Measure it with `sparsmith eval`, or export it and generate with AutoModelForSeq2SeqLM of transformers.",
        )
    if anatomy.task_of(model) == anatomy.SEQ_CLS:
        raise UsageError(
            where,
            "a classifier, which writes no text",
            "a language model",
            "Measure it with `sparsmith eval`, or open its export with transformers.",
        )
