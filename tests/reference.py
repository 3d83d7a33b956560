"""Attention by hand: one query of one head of one row at a time, which sees what the paper says it sees.

Plain and slow, and written without `foreword.attach`: it keeps no cache and uses none of transformers' masks.
What each token may see and where it stands is worked out here, from what is padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]

ATTENTION = {
    r"transformer\.h\.(\d+)\.attn": "decoder",
    r"gpt_neox\.layers\.(\d+)\.attention": "decoder",
    r"model\.(?:decoder\.)?layers\.(\d+)\.self_attn": "decoder",
    r"model\.encoder\.layers\.(\d+)\.self_attn": "encoder",
    r"model\.decoder\.layers\.(\d+)\.encoder_attn": "cross",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention": "encoder",
    r"decoder\.block\.(\d+)\.layer\.0\.SelfAttention": "decoder",
    r"decoder\.block\.(\d+)\.layer\.1\.EncDecAttention": "cross",
}


def attention_layers(model: nn.Module) -> dict[nn.Module, tuple[str, int]]:
    """Every attention layer of a model, with its section and number."""
    found = {}
    for name, module in model.named_modules():
        for pattern, section in ATTENTION.items():
            if match := re.fullmatch(pattern, name):
                found[module] = section, int(match[1])
    return found


def logits_by_hand(
    model: PreTrainedModel,
    prefixes: Sequence[Mapping[str, Layers] | None],
    input_ids: torch.Tensor,
    real: torch.Tensor | None = None,
    *,
    decoder_input_ids: torch.Tensor | None = None,
    decoder_real: torch.Tensor | None = None,
    infix: Sequence[int] | None = None,
) -> torch.Tensor:
    """[B, T, V]: the logits of rows that each have their own prefix, or none.

    Args:
        prefixes: for each row the sections of its prefix.
        input_ids: [B, T].
        real: [B, T] of bool, which tokens aren't padding.
        infix: for each row how many places stand before the virtual tokens. Default: none do.
    """
    seq2seq = model.config.is_encoder_decoder
    x_real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real.bool()
    y_real = x_real
    if seq2seq:
        assert decoder_input_ids is not None
        y_real = torch.ones_like(decoder_input_ids, dtype=torch.bool) if decoder_real is None else decoder_real.bool()
    key_real = {"encoder": x_real, "cross": x_real, "decoder": y_real}
    layers = attention_layers(model)
    calls = []

    def by_hand(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        position_bias: torch.Tensor | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        section, i = layers[module]
        calls.append((section, i))
        batch, heads, length, dim = query.shape
        scaling = dim**-0.5 if scaling is None else scaling
        out = torch.zeros_like(query)
        for b in range(batch):
            sections = prefixes[b]
            for h in range(heads):
                g = h // (heads // key.shape[1])
                for t in range(length):
                    seen = [j for j in range(key.shape[2]) if key_real[section][b, j]]
                    if section == "decoder":
                        seen = [j for j in seen if j <= t and (sliding_window is None or t - j < sliding_window)]
                    keys, values = key[b, g, seen], value[b, g, seen]
                    bias = torch.zeros(len(seen)) if position_bias is None else position_bias[0, h, t, seen]
                    if sections is not None and (infix is None or t >= infix[b]):
                        virtual_keys, virtual_values = sections[section][i]
                        keys = torch.cat([virtual_keys[g], keys])
                        values = torch.cat([virtual_values[g], values])
                        bias = torch.cat([torch.zeros(virtual_keys.shape[1]), bias])
                    if len(keys):
                        scores = keys @ query[b, h, t] * scaling
                        if softcap is not None:
                            scores = softcap * torch.tanh(scores / softcap)
                        weights = torch.softmax(scores + bias, dim=0)
                        out[b, h, t] = weights @ values
        return out.transpose(1, 2), None

    inputs: dict[str, torch.Tensor] = {"input_ids": input_ids}
    if seq2seq:
        inputs["decoder_input_ids"] = decoder_input_ids
    else:
        positions = torch.zeros_like(input_ids)
        for b, sections in enumerate(prefixes):
            for t in range(input_ids.shape[1]):
                positions[b, t] = int(x_real[b, :t].sum())
                if sections is not None and (infix is None or t >= infix[b]):
                    positions[b, t] += sections["decoder"][0][0].shape[1]
        inputs["position_ids"] = positions
    before = model.config._attn_implementation
    AttentionInterface.register("by-hand", by_hand)
    model.set_attn_implementation("by-hand")
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
    assert sorted(calls) == sorted(layers.values()), "each attention layer once"
    return logits
