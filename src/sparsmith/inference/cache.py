"""Keys and values of a run of blocks, in buffers that grow by doubling and are cut back without a copy.

Every block keeps all of its past, sliding ones too: the family's mask does the window, and cutting off rejected tokens stays exact.

Shapes: B rows, H key/value heads, S tokens, P head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_FIRST = 64  # tokens that a new buffer has room for beyond what it is given


class GrowingLayer(DynamicLayer):
    """One block's keys and values. `keys` and `values` are views (B, H, S, P) of the filled part of the buffers."""

    keys: Tensor
    values: Tensor
    _keys: Tensor
    _values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, new, P) and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = 0
            self._length = 0
        start, stop = self._length, self._length + key_states.shape[-2]
        if stop > self._room:
            self._grow(key_states, value_states, stop)
        self._keys[:, :, start:stop] = key_states
        self._values[:, :, start:stop] = value_states
        self._show(stop)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; as in transformers, the count is not positive."""
        assert tokens_to_remove <= 0
        if self.is_initialized and tokens_to_remove:
            self._show(self._length + tokens_to_remove)

    def get_seq_length(self) -> int:
        return self._length if self.is_initialized else 0

    def _show(self, length: int) -> None:
        self._length = length
        self.keys, self.values = self._keys.narrow(2, 0, length), self._values.narrow(2, 0, length)

    def _grow(self, keys: Tensor, values: Tensor, length: int) -> None:
        room = max(2 * self._room, length + _FIRST)
        old = self._length
        for name, new in (("_keys", keys), ("_values", values)):
            rows, heads, _, size = new.shape
            buffer = torch.empty(rows, heads, room, size, dtype=new.dtype, device=new.device)
            if old:
                buffer[:, :, :old] = getattr(self, name)[:, :, :old]
            setattr(self, name, buffer)
        self._room = room


class SegmentCache(Cache):
    """The cache of blocks first..first+len(layers)-1, whose attention modules count from the model's first block."""

    def __init__(self, layers: Sequence[GrowingLayer], first: int) -> None:
        super().__init__(layers=list(layers))
        self.own = tuple(layers)
        self.first = first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.own[layer_idx - self.first].update(key_states, value_states, *args, **kwargs)

    @property
    def length(self) -> int:
        """Tokens that every one of these blocks holds."""
        return self.own[0].get_seq_length() if self.own else 0

    def cut_to(self, length: int) -> None:
        """Drop all tokens from the one at `length` on."""
        for layer in self.own:
            layer.crop(min(0, length - layer.get_seq_length()))
