"""Rows of a batch that begin alike: the tokens that they share are run once.

In a decoder-only base what the layers make of a token hangs on the prefix and on the tokens up to it, and on none after.
So where rows begin with the same tokens (several references of one record, a system prompt, the names of a table's
columns) these need to be run once, forward and backward. A batch [B, T] is run as one row of its N distinct tokens, without
padding; attention alone takes it apart into rows again, each with its own keys. Losses and gradients are the same but for
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import nn

__all__ = ["Shared", "common_starts"]

LEAST = 1 / 20
"""The share of a batch, padding counted, that must be saved: taking rows apart and putting them together has a price."""


def common_starts(
    ids: Sequence[Sequence[int]], owners: Sequence[int] | None = None, infix: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """How many of each row's first tokens another row has too.

    Args:
        ids: each row's tokens.
        owners: which prefix each row has; rows of different ones share nothing. Default: all have one.
        infix: how many of each row's tokens stand before the virtual ones. Default: none.

    Returns:
        an order of the rows; and for each row, in the order given, how many of its tokens the one before it there has.
    """
    owners = owners or [0] * len(ids)
    order = sorted(range(len(ids)), key=lambda b: (owners[b], ids[b]))
    common = [0] * len(ids)
    for a, b in pairwise(order):
        if owners[a] == owners[b]:
            common[b] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[a], ids[b], strict=False)))
            if infix is not None and infix[a] != infix[b]:
                common[b] = min(common[b], infix[a], infix[b])
    return order, common


@dataclass(frozen=True, eq=False)
class Shared:
    """Where the tokens of B rows are among N distinct ones.

    Args:
        places: [B, T], of each token of each row; of padding, where the row's last token is.
        first: [N], in which of the B·T places each of them is first.
        sources, bags: [tokens that are no padding] and [N]: in which of the B·T places they all are, one after the other, and
            where in `sources` the places of each begin.
    """

    places: torch.Tensor
    first: torch.Tensor
    sources: torch.Tensor
    bags: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls,
        ids: Sequence[Sequence[int]],
        owners: Sequence[int] | None = None,
        infix: Sequence[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> Shared | None:
        """See `common_starts`. None where too little would be saved."""
        order, common = common_starts(ids, owners, infix)
        longest, count = max(map(len, ids)), sum(map(len, ids)) - sum(common)
        if count > (1 - LEAST) * len(ids) * longest:
            return None
        places, first = torch.empty(len(ids), longest, dtype=torch.long), torch.empty(count, dtype=torch.long)
        real = torch.zeros_like(places, dtype=torch.bool)
        made, before = 0, order[0]
        for b in order:
            start, end = common[b], len(ids[b])
            own = slice(made, made + end - start)
            places[b, :start] = places[before, :start]
            places[b, start:end] = torch.arange(own.start, own.stop)
            # its own: what is there of another user, who may be no number at all, must not come near
            places[b, end:] = places[b, end - 1]
            first[own] = torch.arange(b * longest + start, b * longest + end)
            real[b, :end] = True
            made, before = own.stop, b
        by_token = places[real].argsort(stable=True)
        sources = real.flatten().nonzero()[:, 0][by_token]
        counts = places[real].bincount(minlength=count)
        return cls(*(tensor.to(device) for tensor in (places, first, sources, counts.cumsum(0) - counts)))

    def mask(self, window: int | None) -> torch.Tensor:
        """[1, 1, T, T] of bool: which of a row's tokens each sees, at most `window` with itself; the same tensor every time."""
        if window not in self._masks:
            length = self.places.shape[1]
            sees = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.places.device).tril()
            self._masks[window] = sees if window is None else sees.triu(1 - window)
        return self._masks[window]

    def apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the distinct tokens, [1, H, N, D], to rows, [B, H, T, D]."""
        _, heads, count, dim = tensor.shape
        rows: torch.Tensor = _Apart.apply(tensor.transpose(1, 2).reshape(count, heads * dim), self)
        return rows.view(*self.places.shape, heads, dim).transpose(1, 2)

    def together(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of rows, [B, T, …], to the distinct tokens, [1, N, …]."""
        whole: torch.Tensor = _Together.apply(tensor.reshape(self.places.numel(), -1), self)
        return whole.view(1, len(self.first), *tensor.shape[2:])


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, shared: Shared) -> torch.Tensor:
        ctx.shared = shared
        return tokens[shared.places.flatten()]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        # two to three times as fast as index_add, and in one order on every device
        return nn.functional.embedding_bag(ctx.shared.sources, outer[0], ctx.shared.bags, mode="sum"), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, shared: Shared) -> torch.Tensor:
        ctx.shared = shared
        return rows[shared.first]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = outer[0].new_zeros(ctx.shared.places.numel(), outer[0].shape[1])
        return rows.index_copy_(0, ctx.shared.first, outer[0]), None
