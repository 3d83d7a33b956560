"""Bases with random weights, in shapes that are not at hand as files: how fast a base is hangs on its shape alone.

They have SmolLM2's tokenizer, and with it its vocabulary of 49,152 tokens. Elsewhere than here they are of no use.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, LlamaConfig

import foreword
from foreword.bases import Base

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama-1b-shaped": (
        LlamaConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "bart-base-shaped": (
        BartConfig,
        {
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
        },
    ),
}
"""By the name that `--base` takes: Llama 3.2 1B's, and BART base's."""


def load(name: str, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None) -> Base:
    """As `foreword.load_base`, which need not know these."""
    if name not in SHAPES:
        return foreword.load_base(name, dtype=dtype, device=device)
    small = foreword.load_base("smollm2-135m", dtype=dtype, device=device)
    kind, sizes = SHAPES[name]
    ids: dict[str, Any] = {"pad_token_id": small.pad_id, "bos_token_id": small.end_id, "eos_token_id": small.end_id}
    config = kind(vocab_size=len(small.embeddings), decoder_start_token_id=small.end_id, **ids, **sizes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with small.device:
        model = auto.from_config(config, dtype=small.dtype)
    return Base(model, small.tokenizer, name)
