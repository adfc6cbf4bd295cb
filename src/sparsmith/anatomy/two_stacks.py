"""Encoder-decoders: their shape by the config, and the way through their two stacks.

A row is a pair: what the encoder reads, S tokens, and what the decoder writes, T tokens. The decoder is fed the answer shifted right by
one, behind a start token. Its blocks attend to themselves and to what the encoder has read, which each of them projects anew.

Shapes: B rows, S tokens read, T tokens written, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsmith.anatomy.access import backbone, base_of
from sparsmith.anatomy.experts import sparse_shape
from sparsmith.anatomy.rows import cross_layer_state, of
from sparsmith.anatomy.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PairShape(ModelShape):
    """The shape of an encoder-decoder. `layers` counts the blocks of both stacks, `attention_linears` are those of one attention."""

    encoder_layers: int
    decoder_layers: int
    distance_params: int
    """Of the tables of relative distances, one in each stack."""

    @property
    def embedding_params(self) -> int:
        """One table, or one for each stack beside the shared one where nothing is tied."""
        return (1 if self.tied else 3) * self.vocab * self.hidden

    @property
    def attention_params(self) -> int:
        each = sum(i * o for i, o in self.attention_linears.values())
        return (self.encoder_layers + 2 * self.decoder_layers) * each + self.distance_params

    @property
    def input_weights(self) -> int:
        """Weights that a token which is read is multiplied by: the encoder's, and the keys and values of the decoder's blocks."""
        _, keys, values, _ = (i * o for i, o in self.attention_linears.values())
        attention = self.encoder_layers * sum(i * o for i, o in self.attention_linears.values())
        return attention + self.decoder_layers * (keys + values) + self._ffn_weights(range(self.encoder_layers))

    @property
    def output_weights(self) -> int:
        """Weights that a token which is written is multiplied by, the head's included."""
        queries, keys, values, out = (i * o for i, o in self.attention_linears.values())
        attention = self.decoder_layers * (2 * queries + keys + values + 2 * out)
        return attention + self._ffn_weights(range(self.encoder_layers, self.layers)) + self.vocab * self.hidden

    @property
    def linear_weights(self) -> int:
        """The mean over a token that is read and one that is written, the head's not included."""
        return (self.input_weights + self.output_weights - self.vocab * self.hidden) // 2

    def row_flops(self, read: int, written: int) -> int:
        """FLOPs of the forward of one row, nothing cached. A masked product is counted whole, as it is computed."""
        attended = self.encoder_layers * read * read + self.decoder_layers * written * (written + read)
        weights = read * self.input_weights + written * self.output_weights
        return 2 * weights + 4 * self.heads * self.head_dim * attended

    def forward_flops(self, context: int) -> int:
        """Per token of a row of twice `context` tokens, half of them read and half written; each passes its own stack alone."""
        return self.row_flops(context, context) // max(2 * context, 1)

    def _ffn_weights(self, blocks: range) -> int:
        """Weights of the FFNs of these blocks that one token uses, routers included, biases not."""
        dense, sparse = sum(i * o for i, o in self.ffn_linears.values()), self.sparse
        if sparse is None:
            return len(blocks) * dense
        mixed = sum(block in sparse.blocks for block in blocks)
        one = sparse.hidden * (sparse.matrices * sparse.width + sparse.experts)  # an expert and the router
        return (len(blocks) - mixed) * dense + mixed * one


def shape_of_pair(config: Any) -> PairShape:
    """From the config alone."""
    row, hidden, inner = of(config), config.d_model, config.num_heads * config.d_kv
    encoder, decoder = config.num_layers, config.num_decoder_layers
    sizes = ((hidden, inner),) * 3 + ((inner, hidden),)
    gated = bool(getattr(config, "is_gated_act", False))
    inward = ("wi_0", "wi_1") if gated else row.ffn_linears[:-1]
    wide = {f"{row.ffn}.{name}": (hidden, config.d_ff) for name in inward}
    wide[f"{row.ffn}.{row.ffn_linears[-1]}"] = (config.d_ff, hidden)
    return PairShape(
        model_type=config.model_type,
        hidden=hidden,
        ffn_width=config.d_ff,
        layers=encoder + decoder,
        heads=config.num_heads,
        kv_heads=config.num_heads,
        head_dim=config.d_kv,
        vocab=config.vocab_size,
        positions=0,
        max_length=0,
        tied=config.tie_word_embeddings,
        ffn_kind="gated" if gated else row.ffn_kind,
        attention_linears=dict(zip((f"{row.attention}.{name}" for name in row.attention_linears), sizes, strict=True)),
        ffn_linears=wide,
        biases=frozenset(),
        norm_params=(2 * encoder + 3 * decoder + 2) * hidden,
        final_norm_params=hidden,
        cross_layer=cross_layer_state(config),
        sparse=sparse_shape(config),
        encoder_layers=encoder,
        decoder_layers=decoder,
        distance_params=2 * config.relative_attention_num_buckets * config.num_heads,
    )


def encode(model: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, S, D): what the encoder makes of the rows; mask: 1 = a token, 0 = padding."""
    base: Any = base_of(model)
    return base.encoder(input_ids=ids_BS, attention_mask=mask_BS.long()).last_hidden_state


def decode(model: nn.Module, ids_BT: Tensor, read_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, T, D): what `logits_of` makes logits of; position t has seen `ids_BT` up to t, and `read_BSD` where the mask is 1."""
    decoder: Any = backbone(model)
    told = {"encoder_hidden_states": read_BSD, "encoder_attention_mask": mask_BS.long()}
    return decoder(input_ids=ids_BT, use_cache=False, **told).last_hidden_state
