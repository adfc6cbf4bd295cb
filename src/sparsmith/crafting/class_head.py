"""Opening a checkpoint as a sequence classifier.

A checkpoint of a language model has no class head: exactly its tensors may be missing then, all of them, and they are drawn from the stream
`classifier.init` of the run's seed. A checkpoint that has one keeps it. What the checkpoint holds for its own head is passed over.

A decoder reads the class at the last token that is no padding, so its config must name the padding token. It is the tokenizer's own,
else the config's, else eos; the exported config says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsmith import anatomy
from sparsmith.errors import CheckpointMismatch
from sparsmith.seeds import torch_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsmith.anatomy import Anatomy

STREAM = "classifier.init"


@dataclass(frozen=True)
class ClassHead:
    """The classes that a checkpoint is opened for."""

    classes: int
    labels: tuple[str, ...] = ()
    """Their names; () = those of the checkpoint where it has as many, else their numbers."""
    seed: int = 42
    """Of a head that is drawn."""

    @classmethod
    def of(cls, config: Any) -> ClassHead | None:
        """What a checkpoint is by its own config; None for a language model."""
        if anatomy.task_of(config) != anatomy.SEQ_CLS:
            return None
        return cls(config.num_labels)

    def enter(self, config: Any, padding: int | None) -> None:
        """Write classes and padding into the config that the model is built from."""
        known = dict(config.id2label or {}) if anatomy.task_of(config) == anatomy.SEQ_CLS else {}
        names = self.labels or (tuple(known.values()) if len(known) == self.classes else ())
        names = names or tuple(map(str, range(self.classes)))
        config.num_labels = self.classes
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.pad_token_id = padding
        config.architectures = anatomy.for_task(config, anatomy.SEQ_CLS).architectures

    def settle_info(self, where: str, row: Anatomy, model: PreTrainedModel, info: dict[str, Any]) -> dict[str, Any]:
        """What did not fit, without what may: a whole class head that is missing, which is drawn here, and the tensors of other heads.

        Raises:
            CheckpointMismatch: a class head of another number of classes.
        """
        head = {f"{row.classifier}.{name}" for name, _ in anatomy.classifier(model).named_parameters()}
        odd = sorted(
            {str(one[0] if isinstance(one, tuple | list) else one) for one in info.get("mismatched_keys") or ()} & head
        )
        if odd:
            raise CheckpointMismatch(
                f"{where}: {odd[0]}",
                "a class head of another size",
                f"one of {self.classes} classes, or none",
                "Set model.num_labels to the checkpoint's number of classes, or start from a checkpoint without a class head.",
            )
        missing = set(map(str, info.get("missing_keys") or ()))
        if head <= missing:
            draw(model, self.seed)
            missing -= head
        unknown = [name for name in map(str, info.get("unexpected_keys") or ()) if not name.startswith(row.other_heads)]
        return {**info, "missing_keys": missing, "unexpected_keys": unknown}


@torch.no_grad()
def draw(model: PreTrainedModel, seed: int) -> None:
    """Weights of the class head from N(0, initializer_range) of its own stream, in order of name; biases 0. In float32, then rounded."""
    stream = torch_generator(seed, STREAM)
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for name, parameter in sorted(anatomy.classifier_tensors(model)):
        drawn = torch.zeros(parameter.shape)
        if not name.endswith("bias"):
            nn.init.normal_(drawn, std=spread, generator=stream)
        parameter.copy_(drawn)
