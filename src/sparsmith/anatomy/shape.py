"""Sizes and exact parameter counts of a dense model, from its config alone (no weights, no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsmith.anatomy.experts import SparseShape, idle_biases, sparse_shape
from sparsmith.anatomy.rows import Anatomy, base_config, cross_layer_state
from sparsmith.anatomy.tasks import SEQ_CLS, require_task, task_of


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the planner needs of a dense model. Counts are exact to the unit; `*_params` are totals over all blocks."""

    model_type: str
    hidden: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    """Rows of the learned position table; 0 without one."""
    max_length: int
    """Longest context, in tokens; 0 = unknown."""
    tied: bool
    ffn_kind: str
    attention_linears: Mapping[str, tuple[int, int]]
    """Name inside the block (`self_attn.q_proj`) -> (inputs, outputs)."""
    ffn_linears: Mapping[str, tuple[int, int]]
    biases: frozenset[str]
    """Names of the linears that have a bias."""
    norm_params: int
    final_norm_params: int
    """Of them, those of the norm before the head."""
    attention_kinds: tuple[str, ...] = ()
    """`full_attention` or `sliding_attention` of each block; () = all alike."""
    cross_layer: str = ""
    """What ties the blocks together so that the last ones cannot be left out; empty where nothing does."""
    classes: int = 0
    """Of a sequence classifier; 0 for a language model."""
    classifier_params: int = 0
    pooler_params: int = 0
    """Of the linear between the last block and a classifier."""
    token_types: int = 0
    """Rows of the table of segment kinds."""
    sparse: SparseShape | None = None
    """The experts, of a mixture."""
    idle_biases: int = 0
    """Parameters of biases that are zero and stay so: an architecture has them that the model it was made from had not."""

    @property
    def dense_blocks(self) -> int:
        """Blocks with a dense FFN."""
        return self.layers - (len(self.sparse.blocks) if self.sparse else 0)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear of one block with a dense FFN, attention first."""
        return {**self.attention_linears, **self.ffn_linears}

    def _size(self, linears: Mapping[str, tuple[int, int]]) -> int:
        return sum(i * o + (o if name in self.biases else 0) for name, (i, o) in linears.items())

    @property
    def attention_params(self) -> int:
        return self.layers * self._size(self.attention_linears)

    @property
    def ffn_params(self) -> int:
        """Of the dense FFNs."""
        return self.dense_blocks * self._size(self.ffn_linears)

    @property
    def linear_weights(self) -> int:
        """Weights of all linears in the blocks that one token uses, experts and routers included, biases not."""
        attention = sum(i * o for i, o in self.attention_linears.values())
        ffn = sum(i * o for i, o in self.ffn_linears.values())
        return self.layers * attention + self.dense_blocks * ffn + (self.sparse.active_params if self.sparse else 0)

    def forward_flops(self, context: int) -> int:
        """FLOPs of a token's forward, which attends to so many: 2 per weight of blocks and head, and 4 * heads * head_dim per attended
        token and block (scores, values)."""
        linear = self.linear_weights + self.head_width * self.hidden
        return 2 * linear + 4 * self.layers * self.heads * self.head_dim * context

    @property
    def embedding_params(self) -> int:
        return (self.vocab + self.positions + self.token_types) * self.hidden

    @property
    def head_params(self) -> int:
        """0 where the head is the embedding; of a classifier those of the class head."""
        if self.classes:
            return self.classifier_params
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def head_width(self) -> int:
        """Outputs of the head: words, or classes."""
        return self.classes or self.vocab

    @property
    def total_params(self) -> int:
        body = self.attention_params + self.ffn_params + self.norm_params
        body += self.sparse.total_params if self.sparse else 0
        return body + self.embedding_params + self.pooler_params + self.head_params


def _attention(row: Anatomy, hidden: int, queries: int, keys: int) -> dict[str, tuple[int, int]]:
    *inward, outward = row.attention_linears
    widths = (queries, keys, keys) if len(inward) == 3 else (queries + 2 * keys,)
    sizes = {f"{row.attention}.{name}": (hidden, width) for name, width in zip(inward, widths, strict=True)}
    return {**sizes, f"{row.attention}.{outward}": (queries, hidden)}


def _ffn(row: Anatomy, hidden: int, width: int) -> dict[str, tuple[int, int]]:
    if not row.ffn_linears:
        return {}
    *inward, outward = row.ffn_linears
    into = 2 * width if row.ffn_kind == "fused_gated" else width
    home = f"{row.ffn}." if row.ffn else ""
    return {**{f"{home}{name}": (hidden, into) for name in inward}, f"{home}{outward}": (width, hidden)}


def _biases(row: Anatomy, config: Any, attention: Iterable[str], ffn: Iterable[str]) -> frozenset[str]:
    attention, from_config = tuple(attention), bool(getattr(config, "attention_bias", False))
    qkv = attention[:-1]
    chosen = {
        "none": (),
        "config": attention if from_config else (),
        "qkv": qkv,
        "qkv_config": qkv if getattr(config, "qkv_bias", False) else (),
        "all": attention,
    }
    in_ffn = {"none": False, "config": bool(getattr(config, "mlp_bias", False)), "all": True}[row.ffn_bias]
    return frozenset((*chosen[row.attention_bias], *(ffn if in_ffn else ())))


def _norms(row: Anatomy, hidden: int, layers: int, head_dim: int, queries: int, keys: int) -> int:
    each = 2 * hidden if row.norm_bias else hidden
    qk = {"none": 0, "head": 2 * head_dim, "full": queries + keys}[row.qk_norm]
    return layers * (row.norms_per_block * each + qk) + each * (bool(row.norm) + row.embedding_norm)


def _classifier(row: Anatomy, hidden: int, classes: int) -> int:
    """Parameters of the class head."""
    behind = hidden * classes + (0 if row.classifier_kind == "linear" else classes)
    return behind + (hidden * (hidden + 1) if row.classifier_kind == "dense" else 0)


def shape_of(subject: Any) -> ModelShape:
    """The shape of a dense (or crafted: of its base) model, or of its config; a config says by `architectures` whether it is that of a
    classifier. Raises `UnsupportedAnatomy` for unknown families, and for one that does not do the task."""
    task = task_of(subject)
    config = base_config(getattr(subject, "config", subject))
    row, classes = require_task(config, task), int(config.num_labels) if task == SEQ_CLS else 0
    if row.encoder_blocks:
        from sparsmith.anatomy.two_stacks import shape_of_pair

        return shape_of_pair(config)
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    queries, keys = heads * head_dim, kv_heads * head_dim
    attention, ffn = _attention(row, hidden, queries, keys), _ffn(row, hidden, width)
    table = max_length = getattr(config, "max_position_embeddings", 0) or 0
    if row.positions_after_padding:
        max_length -= (config.pad_token_id or 0) + 1
    return ModelShape(
        model_type=config.model_type,
        hidden=hidden,
        ffn_width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        positions=table if row.positions else 0,
        max_length=max_length,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        ffn_kind=row.ffn_kind,
        attention_linears=attention,
        ffn_linears=ffn,
        biases=_biases(row, config, attention, ffn),
        norm_params=_norms(row, hidden, layers, head_dim, queries, keys),
        final_norm_params=0 if not row.norm else 2 * hidden if row.norm_bias else hidden,
        attention_kinds=tuple(getattr(config, "layer_types", None) or ()),
        cross_layer=cross_layer_state(config),
        classes=classes,
        classifier_params=_classifier(row, hidden, classes) if classes else 0,
        pooler_params=hidden * (hidden + 1) if row.pooler else 0,
        token_types=config.type_vocab_size if row.token_types else 0,
        sparse=sparse_shape(config),
        idle_biases=layers * sum(attention[name][1] for name in idle_biases(config, row, attention)),
    )
