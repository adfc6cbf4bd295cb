"""Where the parts of a model live and how large they are, as data. Importing this imports no torch."""

from sparsmith.anatomy.access import (
    anatomy_of,
    attention_of,
    backbone,
    base_of,
    blocks,
    ffn_of,
    head,
    logits_of,
    probe,
    set_ffn,
    softcap,
    walk,
)
from sparsmith.anatomy.rows import Anatomy, families, of, register, unregister
from sparsmith.anatomy.shape import ModelShape, shape_of

__all__ = [
    "Anatomy",
    "ModelShape",
    "anatomy_of",
    "attention_of",
    "backbone",
    "base_of",
    "blocks",
    "families",
    "ffn_of",
    "head",
    "logits_of",
    "of",
    "probe",
    "register",
    "set_ffn",
    "shape_of",
    "softcap",
    "unregister",
    "walk",
]
