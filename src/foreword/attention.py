"""Attention with a prefix: what every attention layer of an attached model calls in the place of its own.

    Attn(x) = softmax(Q [K_prefix; K]^T / sqrt(D) + mask) [V_prefix; V]

On a CPU it is written as plain products, a block of queries at a time, with the keys that any of them sees: of causal
attention half is never computed, and a block's scores stay in the caches. Very long rows, and GPUs, go through torch's
fused kernel; or through transformers' own products where scores are capped (Gemma 2), which that kernel cannot. Tokens
that rows have in common (`foreword.sharing`) are taken apart into rows here, and put together again. Registered with
transformers under `NAME`; which prefix a layer has, `foreword.attach` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["NAME", "Mask"]

NAME = "foreword"
"""What the attention function and its mask are registered as, and the attribute that layers and models carry."""

PRODUCTS_MAX_SCORES = 1 << 25
"""On a CPU, attention with fewer scores than this in a layer is written as plain products: their backward pass is faster
than that of the fused kernel, but keeps the scores; beyond it, memory matters more."""

BLOCK = 64
"""Queries in a block of those products, at the least."""


class Mask:
    """Which keys each query sees; layers that see the same share one.

    Args:
        tensor: [B or 1, H or 1, T, K]: bool, True for what is seen, or what is added to the scores. None: all is seen.
        queries, keys: T and K.
    """

    def __init__(self, tensor: torch.Tensor | None, queries: int, keys: int):
        self.tensor, self.queries, self.keys = tensor, queries, keys
        self._added: torch.Tensor | None = None

    def added(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What to add to scores of this dtype, which takes a quarter of the time that filling them does."""
        if self.tensor is None or self.tensor.dtype != torch.bool:
            return self.tensor
        if self._added is None or self._added.dtype != dtype:
            # the padding of a left-padded row may see nothing: unlike -inf, this keeps its softmax finite, in float32, too
            hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
            self._added = torch.zeros_like(self.tensor, dtype=dtype).masked_fill_(~self.tensor, hidden)
        return self._added

    @cached_property
    def blocks(self) -> Sequence[tuple[slice, slice]]:
        """Blocks of queries, each with the keys up to the last that any of them sees, one at the least."""
        size = -(-self.queries // max(1, self.queries // BLOCK))
        of_queries = [slice(start, start + size) for start in range(0, self.queries, size)]
        if len(of_queries) == 1 or self.tensor is None or self.tensor.dtype != torch.bool:
            return [(block, slice(0, self.keys)) for block in of_queries]
        seen, numbers = self.tensor.amax((0, 1)), torch.arange(1, self.keys + 1)
        return [(block, slice(0, max(1, int((seen[block].amax(0) * numbers).max())))) for block in of_queries]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What every attention layer of an attached model calls. Returns [B, T, H, D]."""
    extension, section, i = module.__dict__[NAME]
    shared = extension.shared
    if shared is not None:
        query, key, value = shared.apart(query), shared.apart(key), shared.apart(value)
        attention_mask = shared.mask(kwargs.get("sliding_window"))
    length = key.shape[2]
    key, value, mask = extension.extend(section, i, query, key, value, attention_mask)
    if position_bias is not None:
        position_bias = nn.functional.pad(position_bias, (key.shape[2] - length, 0))
    few = query.shape[:3].numel() * key.shape[2] <= PRODUCTS_MAX_SCORES
    if few and query.device.type == "cpu" and not dropout:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _Products.apply(query, key, value, mask, scaling, position_bias, softcap)
    elif softcap is None:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask.tensor,
            dropout=dropout,
            scaling=scaling,
            is_causal=False,
            position_bias=position_bias,
        )
    else:
        # where scores are capped the module is there; elsewhere nobody should wait for it
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

        added = mask.added(query.dtype)
        out, _ = eager_attention_forward(module, query, key, value, added, dropout, scaling, softcap)
    return out if shared is None else shared.together(out), None


class _Products(torch.autograd.Function):
    """softmax(cap(Q K^T scaling) + bias + mask) V as plain products, with the H query heads folded onto their G key/value
    heads; cap(s) = softcap tanh(s / softcap), or s.

    Its backward pass keeps no more than Q, K, V, the weights and the slopes of caps, and makes no gradient for bias or
    mask: both are frozen.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Mask,
        scaling: float,
        position_bias: torch.Tensor | None,
        softcap: float | None,
    ) -> torch.Tensor:
        batch, heads, length, dim = query.shape
        ctx.blocks, ctx.scaling = mask.blocks, scaling
        query = query * scaling
        out = value.new_empty(batch, length, heads, dim)
        kept, slopes = [], []
        for block, seen in ctx.blocks:
            scores = _fold(query[:, :, block], key) @ key[:, :, seen].mT
            if softcap is not None:
                tanh = (scores / softcap).tanh_()
                scores = tanh * softcap
                slopes.append(1 - tanh * tanh)
            by_head = scores.view(batch, heads, -1, seen.stop)
            if position_bias is not None:
                by_head += position_bias[:, :, block, seen]
            if (added := mask.added(scores.dtype)) is not None:
                by_head += added[:, :, block, seen]
            weights = scores.softmax(-1)
            out[:, block] = (weights @ value[:, :, seen]).view(batch, heads, -1, dim).transpose(1, 2)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept, *slopes)
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        count = len(ctx.blocks)
        of_blocks = zip(ctx.blocks, kept[:count], kept[count:] or [None] * count, strict=True)
        of_query, of_key, of_value = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((query, key, value), ctx.needs_input_grad[:3], strict=True)
        )
        for (block, seen), weights, slope in of_blocks:
            out = _fold(outer[0][:, block].transpose(1, 2), key)
            if of_value is not None:
                of_value[:, :, seen] += weights.mT @ out
            if of_query is None and of_key is None:
                continue
            scores = torch._softmax_backward_data(out @ value[:, :, seen].mT, weights, -1, weights.dtype)
            if slope is not None:
                scores *= slope
            if of_key is not None:
                of_key[:, :, seen] += scores.mT @ _fold(query[:, :, block], key)
            if of_query is not None:
                part = of_query[:, :, block]
                torch.mul((scores @ key[:, :, seen]).view(part.shape), ctx.scaling, out=part)
        return of_query, of_key, of_value, None, None, None, None


def _fold(queries: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] to [B, G, H/G·T, D]: the heads that share keys, one after the other."""
    return queries.reshape(*key.shape[:2], -1, key.shape[3])


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' own boolean mask, always written out where it is causal: with a prefix, "causal" alone isn't enough."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
