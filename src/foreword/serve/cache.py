"""Keys and values of the rows under way: rows come and go between steps, and no other row is copied for it.

A layer's are in one buffer [R, G, C, D]. The rows under way are its first B; the columns in use are start to end, and a
row of l tokens has the last l of them, so that all rows write their next token into one column. A row that joins takes
a free place; one that leaves is replaced by the last. The buffers are made anew only when a row or column is lacking,
with some to spare, and shrink then, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from foreword.prefix import Layer

__all__ = ["RunningCache"]

SPARE_COLUMNS = 64
"""At least so many columns are left free when buffers are made."""


class _RunningLayer(CacheLayerMixin):
    """What one attention layer of the model writes to and reads. `keys` and `values` are [B, G, K, D], K = end - start."""

    is_sliding = False

    def __init__(self, cache: RunningCache):
        super().__init__()
        self.cache = cache
        self.buffers: tuple[torch.Tensor, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("rows join before the model runs")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token of every row into the next column, which `RunningCache.advance` then counts."""
        cache = self.cache
        assert key_states.shape[2] == 1
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: cache.rows, :, cache.end] = states[:, :, 0]
        return self.seen(cache.end + 1)

    def seen(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer[: self.cache.rows, :, self.cache.start : end] for buffer in self.buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.span

    def get_max_length(self) -> int:
        return -1


class RunningCache(Cache):
    """The rows' keys and values in every layer of one section, as transformers' models take a cache.

    Attributes:
        lengths: tokens of each row.
        start, end: the columns in use.
    """

    def __init__(self, layers: int):
        self.lengths: list[int] = []
        self.start = self.end = 0
        self._own = [_RunningLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._own))

    @property
    def rows(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def span(self) -> int:
        """K: as many tokens as the longest row has."""
        return self.end - self.start

    def mask(self, new: int = 0) -> torch.Tensor:
        """[B, K + new] of int64: 1 where a row has a token, or is about to have one."""
        first = self.span - torch.tensor(self.lengths)
        return (torch.arange(self.span + new) >= first[:, None]).long()

    def join(self, layers: Sequence[Layer], lengths: Sequence[int]) -> None:
        """Take rows in, behind those that are there.

        Args:
            layers: for each layer their keys and values, [b, G, T, D], of which a row has the last `lengths[b]` columns.
            lengths: [b].
        """
        before, longest = self.rows, max(lengths)
        self.lengths += lengths
        buffers = self._own[0].buffers
        if not buffers or self.rows > buffers[0].shape[0] or longest > self.end:
            self._rebuild(before, longest, layers)
        self.start = min(self.start, self.end - longest)
        for layer, new in zip(self._own, layers, strict=True):
            for buffer, states in zip(layer.buffers, new, strict=True):
                buffer[before : self.rows, :, self.end - longest : self.end] = states[:, :, -longest:]
        self._show()

    def leave(self, row: int) -> None:
        """Let a row go; the last row takes its number."""
        last = self.rows - 1
        for layer in self._own:
            for buffer in layer.buffers:
                if row != last:
                    buffer[row, :, self.start : self.end] = buffer[last, :, self.start : self.end]
                # whoever joins there has it masked, and what is masked must be finite
                buffer[last, :, self.start : self.end] = 0
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.start = self.end - max(self.lengths, default=0)
        self._show()

    def make_room(self) -> None:
        """See that the next column is there: to be called before the model runs."""
        if self.end == self._own[0].buffers[0].shape[2]:
            self._rebuild(self.rows, self.span, [])

    def advance(self) -> None:
        """The model has run: every row has one token more."""
        self.lengths = [length + 1 for length in self.lengths]
        self.end += 1

    def _rebuild(self, rows: int, longest: int, like: Sequence[Layer]) -> None:
        """Make the buffers anew, for all rows and `longest` columns before `end`, and copy the first `rows` rows."""
        span = self.span
        end = max(span, longest)
        height, width = self.rows + max(2, self.rows // 4), end + max(SPARE_COLUMNS, end // 4)
        for i, layer in enumerate(self._own):
            old = layer.buffers or like[i]
            # zeros, since what is masked must be finite too
            layer.buffers = tuple(one.new_zeros(height, one.shape[1], width, one.shape[3]) for one in old)
            if rows:
                for to, one in zip(layer.buffers, old, strict=True):
                    to[:rows, :, end - span : end] = one[:rows, :, self.start : self.end]
        self.start, self.end = end - span, end

    def _show(self) -> None:
        # an encoder-decoder model reads the attributes themselves in its cross-attention
        for layer in self._own:
            layer.keys, layer.values = layer.seen(self.end)
            layer.is_initialized = True
