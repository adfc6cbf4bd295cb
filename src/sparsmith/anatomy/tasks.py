"""What a model is for: the next token, the class of a text, or an answer that a decoder writes to what an encoder has read. Told by its
class, or by the class that its config names."""

from __future__ import annotations

import copy
from typing import Any

from sparsmith.anatomy.rows import Anatomy, base_config, families, of
from sparsmith.errors import UnsupportedAnatomy

CAUSAL_LM, SEQ_CLS, SEQ2SEQ = "causal_lm", "seq_cls", "seq2seq"
_ENDINGS = {
    CAUSAL_LM: "ForCausalLM",
    SEQ_CLS: "ForSequenceClassification",
    SEQ2SEQ: "ForConditionalGeneration",
}


def task_of(subject: Any) -> str:
    """`seq_cls` of a sequence classifier and `seq2seq` of an encoder-decoder (a model, or a config whose `architectures` name one), else
    `causal_lm`."""
    config = base_config(getattr(subject, "config", None) if hasattr(subject, "named_parameters") else subject)
    if hasattr(subject, "named_parameters"):
        named: Any = [kind.__name__ for kind in type(subject).__mro__]
    else:
        named = (getattr(config, "architectures", None) or ())[:1]
    if any(str(name).endswith(_ENDINGS[SEQ_CLS]) for name in named):
        return SEQ_CLS
    # models that read pictures have the same ending, and are decoders
    reads_apart = bool(getattr(config, "is_encoder_decoder", False))
    return SEQ2SEQ if reads_apart and any(str(name).endswith(_ENDINGS[SEQ2SEQ]) for name in named) else CAUSAL_LM


def for_task(config: Any, task: str, classes: int | None = None) -> Any:
    """A copy of a config that says what its model is for, whatever the checkpoint was made for."""
    config = copy.deepcopy(config)
    inner = base_config(config)
    kind = "".join(part.capitalize() for part in str(inner.model_type).split("_"))
    inner.architectures = [kind + _ENDINGS[task]]
    if classes is not None:
        inner.num_labels = classes
    return config


def require_task(config: Any, task: str) -> Anatomy:
    """The row of a config's family, which must do the task.

    Raises:
        UnsupportedAnatomy: an encoder that is to write text, a decoder that is to answer what an encoder has read, or the other way round.
    """
    row = of(config)
    if task not in row.tasks:
        others = families(task)
        raise UnsupportedAnatomy(
            f"{type(base_config(config)).__name__} (model_type {row.model_types[0]})",
            f"a family that does {' and '.join(row.tasks)}, for the task {task}",
            f"a family that does {task}",
            f"Set model.task to {row.tasks[0]}, or take one of: {', '.join(others)}.",
        )
    return row
