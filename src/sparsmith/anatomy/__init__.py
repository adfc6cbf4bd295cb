"""Where the parts of a model live and how large they are, as data. Importing this imports no torch."""

from sparsmith.anatomy.access import (
    anatomy_of,
    attention_of,
    backbone,
    base_of,
    blocks,
    ffn_of,
    ffns,
    head,
    logits_of,
    probe,
    set_ffn,
    softcap,
    walk,
)
from sparsmith.anatomy.classifier import classifier, classifier_tensors, narrow_classifier, widen_classifier
from sparsmith.anatomy.experts import SparseShape, idle_biases, is_sparse, refuse_sparse, sparse_shape
from sparsmith.anatomy.rows import Anatomy, families, of, register, unregister
from sparsmith.anatomy.shape import ModelShape, shape_of
from sparsmith.anatomy.tasks import CAUSAL_LM, SEQ2SEQ, SEQ_CLS, for_task, require_task, task_of
from sparsmith.anatomy.two_stacks import PairShape, decode, encode

__all__ = [
    "CAUSAL_LM",
    "SEQ2SEQ",
    "SEQ_CLS",
    "Anatomy",
    "ModelShape",
    "PairShape",
    "SparseShape",
    "anatomy_of",
    "attention_of",
    "backbone",
    "base_of",
    "blocks",
    "classifier",
    "classifier_tensors",
    "decode",
    "encode",
    "families",
    "ffn_of",
    "ffns",
    "for_task",
    "head",
    "idle_biases",
    "is_sparse",
    "logits_of",
    "narrow_classifier",
    "of",
    "probe",
    "refuse_sparse",
    "register",
    "require_task",
    "set_ffn",
    "shape_of",
    "softcap",
    "sparse_shape",
    "task_of",
    "unregister",
    "walk",
    "widen_classifier",
]
