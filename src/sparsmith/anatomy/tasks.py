"""What a model is for: the next token, or the class of a text. Told by its class, or by the class that its config names."""

from __future__ import annotations

import copy
from typing import Any

from sparsmith.anatomy.rows import Anatomy, base_config, families, of
from sparsmith.errors import UnsupportedAnatomy

CAUSAL_LM, SEQ_CLS = "causal_lm", "seq_cls"
_CLASSIFIER = "ForSequenceClassification"


def task_of(subject: Any) -> str:
    """`seq_cls` of a sequence classifier (a model, or a config whose `architectures` name one), else `causal_lm`."""
    if hasattr(subject, "named_parameters"):
        named: Any = [kind.__name__ for kind in type(subject).__mro__]
    else:
        named = (getattr(base_config(subject), "architectures", None) or ())[:1]
    return SEQ_CLS if any(str(name).endswith(_CLASSIFIER) for name in named) else CAUSAL_LM


def for_task(config: Any, task: str, classes: int | None = None) -> Any:
    """A copy of a config that says what its model is for, whatever the checkpoint was made for."""
    config = copy.deepcopy(config)
    inner = base_config(config)
    kind = "".join(part.capitalize() for part in str(inner.model_type).split("_"))
    inner.architectures = [kind + (_CLASSIFIER if task == SEQ_CLS else "ForCausalLM")]
    if classes is not None:
        inner.num_labels = classes
    return config


def require_task(config: Any, task: str) -> Anatomy:
    """The row of a config's family, which must do the task.

    Raises:
        UnsupportedAnatomy: an encoder that is to write text.
    """
    row = of(config)
    if task not in row.tasks:
        others = [name for name in families() if name not in row.model_types]
        raise UnsupportedAnatomy(
            f"{type(base_config(config)).__name__} (model_type {row.model_types[0]})",
            f"a family that does {' and '.join(row.tasks)}, for the task {task}",
            f"a family that does {task}",
            f"Set model.task to {row.tasks[0]}, or take one of: {', '.join(others)}.",
        )
    return row
