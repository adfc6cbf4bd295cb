"""Where the parts of a model live, per Hugging Face family, as data. Code elsewhere never says `model.model.layers`.

A family is one row. `register` adds one from outside. Checked against transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsmith.errors import CrossLayerStateError, UnknownAnatomy, UnsupportedAnatomy, nearest

_GATED = ("gate_proj", "up_proj", "down_proj")
_SPLIT_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One family: dotted paths inside the model, names inside a block, and what its parameter count depends on."""

    model_types: tuple[str, ...]
    blocks: str = "model.layers"
    ffn: str = "mlp"
    """Empty where a block's FFN is no module of its own: its linears are then named from the block."""
    attention: str = "self_attn"
    norm: str = "model.norm"
    """Before the head; empty where there is none."""
    embeddings: str = "model.embed_tokens"
    positions: str = ""
    """Learned position embeddings, where there are any."""
    head: str = "lm_head"
    classifier: str = "score"
    """The head of the family's sequence classifier."""
    classifier_kind: Literal["linear", "biased", "dense"] = "linear"
    """One linear, one with a bias, or a square linear and one behind it, both with a bias."""
    pooler: str = ""
    """The linear between the last block and the classifier, where the model without a head has one."""
    reads: Literal["last", "first"] = "last"
    """The token whose hidden state is classified: the last that is no padding, or the first."""
    other_heads: tuple[str, ...] = ("lm_head.",)
    """How tensors begin that a checkpoint holds for its own task and a classifier has no place for."""
    tasks: tuple[str, ...] = ("causal_lm", "seq_cls")
    token_types: bool = False
    """Embeddings of the kinds of segments, `type_vocab_size` of them."""
    embedding_norm: bool = False
    positions_after_padding: bool = False
    """True where a text's positions are counted on from the padding token's id, so that the table holds so many fewer."""
    attention_linears: tuple[str, ...] = _SPLIT_ATTENTION
    ffn_linears: tuple[str, ...] = _GATED
    ffn_kind: Literal["gated", "fused_gated", "plain"] = "gated"
    ffn_reads: Literal["normed", "residual"] = "normed"
    """What the FFN is fed: a normed hidden state, or the bare residual stream (OLMo2)."""
    post_ffn_norm: bool = False
    """True where a norm follows the FFN, so what is added to its output is re-normalised."""
    parallel_residual: bool = False
    norms_per_block: int = 2
    """Norms of width `hidden` in a block."""
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norms on queries and keys: none, one of `head_dim` each, or over all heads."""
    conv1d: bool = False
    """True where linears hold their weight transposed (GPT-2's Conv1D)."""
    attention_bias: Literal["none", "config", "qkv", "qkv_config", "all"] = "none"
    """`config`: all or none, as `attention_bias` says; `qkv`: queries, keys and values; `qkv_config`: these, where `qkv_bias` says so."""
    ffn_bias: Literal["none", "config", "all"] = "none"
    head_counts: Literal["any", "divides", "fixed"] = "fixed"
    """How many heads a checkpoint of the family may have: any number (`head_dim` stands in the config), a divisor of the hidden size, or
    hidden size / head size and no other."""
    experts: str = ""
    """In the FFN of a sparse block: the module of the experts' stacked weights. Empty for a family of dense models."""
    router: str = "gate"
    """In the FFN of a sparse block."""
    shared_expert: bool = False
    """True where every token also takes an expert that all share (`shared_expert`), behind a gate of its own (`shared_expert_gate`)."""
    attention_out_norm: str = ""
    """In a block: the norm between the attention and the residual stream, where there is one."""
    ffn_out_norm: str = ""
    """In a block: the norm between the FFN and the residual stream, where there is one."""
    encoder_blocks: str = ""
    """Of an encoder-decoder the encoder's blocks; `blocks`, `ffn`, `attention` and `norm` are then the decoder's."""
    encoder_ffn: str = ""
    """In a block of such an encoder."""
    scaled_head: bool = False
    """True where a head that is the embedding reads its input over sqrt(hidden)."""

    @property
    def linears(self) -> dict[str, tuple[str, str]]:
        """Path inside a block of every linear -> (the part that it belongs to, its name there), attention first."""
        return {
            f"{part}.{name}".lstrip("."): (part, name)
            for part, names in ((self.attention, self.attention_linears), (self.ffn, self.ffn_linears))
            for name in names
        }


def _encoder(name: str, **own: Any) -> Anatomy:
    """BERT and what was built on its code: post-norm blocks whose FFN is spread over two modules of the block."""
    inside = f"{name}.embeddings"
    return Anatomy(
        model_types=(name,),
        blocks=f"{name}.encoder.layer",
        ffn="",
        attention="attention",
        norm="",
        embeddings=f"{inside}.word_embeddings",
        positions=f"{inside}.position_embeddings",
        classifier="classifier",
        reads="first",
        tasks=("seq_cls",),
        token_types=True,
        embedding_norm=True,
        attention_linears=("self.query", "self.key", "self.value", "output.dense"),
        ffn_linears=("intermediate.dense", "output.dense"),
        ffn_kind="plain",
        norm_bias=True,
        attention_bias="all",
        ffn_bias="all",
        **own,
    )


def _two_stacks(name: str, ffn: str, **own: Any) -> Anatomy:
    """T5 and what was built on its code: an encoder-decoder."""
    return Anatomy(
        model_types=(name,),
        blocks="decoder.block",
        encoder_blocks="encoder.block",
        ffn=f"layer.2.{ffn}",
        encoder_ffn=f"layer.1.{ffn}",
        attention="layer.0.SelfAttention",
        norm="decoder.final_layer_norm",
        embeddings="shared",
        other_heads=(),
        tasks=("seq2seq",),
        attention_linears=("q", "k", "v", "o"),
        ffn_linears=("wi", "wo"),
        ffn_kind="plain",
        norms_per_block=3,
        head_counts="any",
        scaled_head=True,
        **own,
    )


_ROWS: list[Anatomy] = [
    Anatomy(model_types=("llama",), attention_bias="config", ffn_bias="config", head_counts="divides"),
    Anatomy(model_types=("mistral",), head_counts="any"),
    Anatomy(model_types=("qwen2",), attention_bias="qkv", head_counts="any"),
    Anatomy(model_types=("qwen3",), attention_bias="config", qk_norm="head", head_counts="any"),
    Anatomy(
        model_types=("gemma2",),
        attention_bias="config",
        post_ffn_norm=True,
        norms_per_block=4,
        head_counts="divides",
        attention_out_norm="post_attention_layernorm",
        ffn_out_norm="post_feedforward_layernorm",
    ),
    Anatomy(
        model_types=("gemma3_text",),
        attention_bias="config",
        post_ffn_norm=True,
        norms_per_block=4,
        qk_norm="head",
        head_counts="divides",
        attention_out_norm="post_attention_layernorm",
        ffn_out_norm="post_feedforward_layernorm",
    ),
    Anatomy(
        model_types=("olmo2",),
        attention_bias="config",
        ffn_reads="residual",
        post_ffn_norm=True,
        qk_norm="full",
        attention_out_norm="post_attention_layernorm",
        ffn_out_norm="post_feedforward_layernorm",
    ),
    Anatomy(model_types=("mixtral",), ffn_linears=(), head_counts="any", experts="experts"),
    Anatomy(
        model_types=("qwen2_moe",),
        attention_bias="qkv_config",
        head_counts="any",
        experts="experts",
        shared_expert=True,
    ),
    Anatomy(model_types=("qwen3_moe",), attention_bias="config", qk_norm="head", head_counts="any", experts="experts"),
    Anatomy(
        model_types=("flex_olmo",),
        attention_bias="config",
        ffn_reads="residual",
        post_ffn_norm=True,
        qk_norm="full",
        ffn_linears=(),
        experts="experts",
        attention_out_norm="post_attention_layernorm",
        ffn_out_norm="post_feedforward_layernorm",
    ),
    Anatomy(
        model_types=("phi3",),
        attention_linears=("qkv_proj", "o_proj"),
        ffn_linears=("gate_up_proj", "down_proj"),
        ffn_kind="fused_gated",
        head_counts="any",
    ),
    Anatomy(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        other_heads=("lm_head.", "embed_out."),
        attention="attention",
        norm="gpt_neox.final_layer_norm",
        embeddings="gpt_neox.embed_in",
        attention_linears=("query_key_value", "dense"),
        ffn_linears=("dense_h_to_4h", "dense_4h_to_h"),
        ffn_kind="plain",
        parallel_residual=True,
        norm_bias=True,
        attention_bias="config",
        ffn_bias="all",
    ),
    Anatomy(
        model_types=("gpt2",),
        blocks="transformer.h",
        attention="attn",
        norm="transformer.ln_f",
        embeddings="transformer.wte",
        positions="transformer.wpe",
        attention_linears=("c_attn", "c_proj"),
        ffn_linears=("c_fc", "c_proj"),
        ffn_kind="plain",
        norm_bias=True,
        conv1d=True,
        attention_bias="all",
        ffn_bias="all",
    ),
    _encoder("bert", classifier_kind="biased", pooler="bert.pooler.dense", other_heads=("cls.",)),
    _two_stacks("t5", "DenseReluDense"),
    _two_stacks("switch_transformers", "mlp", experts="experts", router="router"),
    _encoder(
        "roberta", classifier_kind="dense", positions_after_padding=True, other_heads=("lm_head.", "roberta.pooler.")
    ),
]

LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "kv_sharing_modes")
"""Config fields that hold one entry per block, in families known today; whoever takes blocks out cuts them too."""

# config fields that mean state which crosses blocks -> what it is
_CROSS_LAYER = {
    "num_kv_shared_layers": "blocks that reuse the keys and values of earlier ones",
    "kv_sharing_modes": "blocks that reuse the keys and values of earlier ones",
    "altup_num_inputs": "alternating updates of several residual streams",
    "hidden_size_per_layer_input": "embeddings that every block reads anew",
    "laurel_rank": "learned augmented residuals",
    "num_nextn_predict_layers": "blocks that predict further tokens",
    "mtp_num_hidden_layers": "blocks that predict further tokens",
    "linear_num_key_heads": "linear attention, whose state is no cache of keys and values",
    "mamba_d_state": "state-space blocks, whose state is no cache of keys and values",
    "ssm_state_size": "state-space blocks, whose state is no cache of keys and values",
}
_PLAIN_LAYER_TYPES = ("full_attention", "sliding_attention")

# config fields that only mixtures of experts have
_MOE_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def register(row: Anatomy) -> Anatomy:
    """Add (or replace, by model type) a family of one's own."""
    _ROWS[:] = [known for known in _ROWS if not set(known.model_types) & set(row.model_types)]
    _ROWS.append(row)
    return row


def unregister(row: Anatomy) -> None:
    """Take back what `register` added."""
    if row in _ROWS:
        _ROWS.remove(row)


def families(task: str | None = None) -> tuple[str, ...]:
    """Every model type that has a row; with a task those that do it."""
    return tuple(name for row in _ROWS if task is None or task in row.tasks for name in row.model_types)


def sparse_families() -> tuple[str, ...]:
    """Of them, the mixtures of experts."""
    return tuple(name for row in _ROWS if row.experts for name in row.model_types)


def known_names(field: str) -> tuple[str, ...]:
    """Every value that a field has among the rows, without repeats."""
    return tuple(dict.fromkeys(getattr(row, field) for row in _ROWS))


def base_config(config: Any) -> Any:
    """The config of the dense base: of a crafted model's config the one nested inside."""
    inner = getattr(config, "base_config", None)
    return config if inner is None else inner


def cross_layer_state(config: Any) -> str:
    """What in this config makes a block depend on more than the hidden state of the one before; empty where nothing does."""
    config = base_config(config)
    config = getattr(config, "text_config", None) or config
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder whose output every decoder block reads"
    for field, what in _CROSS_LAYER.items():
        if getattr(config, field, None):
            return f"{what} ({field})"
    other = [kind for kind in getattr(config, "layer_types", None) or () if kind not in _PLAIN_LAYER_TYPES]
    return f"blocks of the kind `{other[0]}` (layer_types)" if other else ""


def of(config: Any) -> Anatomy:
    """The row of a model's config (a crafted model's too). Raises `UnsupportedAnatomy` for other families and for MoE models."""
    config = base_config(config)
    model_type = str(getattr(config, "model_type", "") or type(config).__name__)
    for row in _ROWS:
        if model_type in row.model_types:
            return row
    crossing = cross_layer_state(config)
    if crossing:
        raise CrossLayerStateError(
            f"{type(config).__name__} (model_type {model_type})",
            crossing,
            "blocks that read nothing but the hidden state of the block before",
            "Take a family with a row in sparsmith.anatomy: " + ", ".join(families()) + ".",
        )
    moe_field = next((field for field in _MOE_FIELDS if getattr(config, field, None)), None)
    if moe_field or "moe" in model_type:
        raise UnsupportedAnatomy(
            f"{type(config).__name__} (model_type {model_type})",
            f"a mixture of experts already ({moe_field or 'by its name'})",
            "a dense model, or a mixture of a family with a row: " + ", ".join(sparse_families()),
            "Start from the dense model of this family.",
        )
    raise UnknownAnatomy(
        f"{type(config).__name__}.model_type",
        f"`{model_type}`",
        "a family with a row in sparsmith.anatomy",
        f"{nearest(model_type, families())} Or register a row of your own with sparsmith.anatomy.register.",
    )
