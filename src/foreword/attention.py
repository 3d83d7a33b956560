"""Attention with a prefix: what every attention layer of an attached model calls in the place of its own.

    Attn(x) = softmax(Q [K_prefix; K]^T / sqrt(D) + mask) [V_prefix; V]

On a CPU, short rows go through plain products, whose backward pass keeps little; everything else goes through torch's
fused kernel. Registered with transformers under `NAME`; which prefix a layer has, `foreword.attach` knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["NAME"]

NAME = "foreword"
"""What the attention function and its mask are registered as, and the attribute that layers and models carry."""

PRODUCTS_MAX_SCORES = 1 << 25
"""On a CPU, attention with fewer scores than this in a layer is written as plain products: for short rows their
backward pass is much faster than that of the fused kernel; beyond it, memory matters more."""


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What every attention layer of an attached model calls. Returns [B, T, H, D]."""
    extension, section, i = module.__dict__[NAME]
    length = key.shape[2]
    key, value, mask = extension.extend(section, i, query, key, value, attention_mask)
    if position_bias is not None:
        position_bias = nn.functional.pad(position_bias, (key.shape[2] - length, 0))
    if dropout or query.device.type != "cpu" or query.shape[:3].numel() * key.shape[2] > PRODUCTS_MAX_SCORES:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=False,
            position_bias=position_bias,
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: torch.Tensor = _Products.apply(query, key, value, mask, scaling, position_bias)
    return out, None


class _Products(torch.autograd.Function):
    """softmax(Q K^T scaling + bias + mask) V as plain products, with the H query heads folded onto their G key/value heads.

    Its backward pass keeps no more than Q, K, V and the weights, and makes no gradient for bias or mask: both are frozen.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        position_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, heads, length, dim = query.shape
        groups, seen = key.shape[1:3]
        query = (query * scaling).reshape(batch, groups, -1, dim)
        scores = (query @ key.mT).view(batch, heads, length, seen)
        if position_bias is not None:
            scores += position_bias
        if mask is not None:
            # the padding of a left-padded row may see nothing: the least number, unlike -inf, keeps its softmax finite
            least = torch.finfo(scores.dtype).min
            scores = scores.masked_fill_(~mask, least) if mask.dtype == torch.bool else scores.add_(mask)
        weights = scores.softmax(-1).view(batch, groups, -1, seen)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scaling = scaling
        return (weights @ value).view(batch, heads, length, dim).transpose(1, 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        batch, length, heads, dim = outer[0].shape
        out = outer[0].transpose(1, 2).reshape(query.shape)
        query_gradient = key_gradient = value_gradient = None
        if ctx.needs_input_grad[2]:
            value_gradient = weights.mT @ out
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            scores = torch._softmax_backward_data(out @ value.mT, weights, -1, weights.dtype)
            if ctx.needs_input_grad[1]:
                key_gradient = scores.mT @ query
            if ctx.needs_input_grad[0]:
                query_gradient = (scores @ key).mul_(ctx.scaling).view(batch, heads, length, dim)
        return query_gradient, key_gradient, value_gradient, None, None, None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' own boolean mask, always written out where it is causal: with a prefix, "causal" alone isn't enough."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
