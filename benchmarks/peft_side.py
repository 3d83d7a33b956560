"""PEFT's prefix tuning, as the other side of our benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model

from foreword.bases import Base
from foreword.batching import pad
from foreword.data import Row
from foreword.interop.peft import import_peft
from foreword.prefix import Prefix


def peft_model(base: Base, *, length: int, projection: bool = False, attention: str | None = None) -> Any:
    """The base's model with PEFT's prefix; `projection` takes its MLP, of the base's hidden size."""
    if attention is not None:
        base.model.set_attn_implementation(attention)
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=length,
        prefix_projection=projection,
        encoder_hidden_size=base.embeddings.shape[1],
    )
    return get_peft_model(base.model, config)


def peft_batch(base: Base, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows right-padded, with labels on y alone, as PEFT's documentation has them."""
    tokens, mask = pad([[*row.x, *row.y] for row in rows], base.pad_id)
    labels = tokens.masked_fill(mask == 0, -100)
    for b, row in enumerate(rows):
        labels[b, : len(row.x)] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(base.device) for name, tensor in batch.items()}


def peft_prefix(base: Base, model: Any) -> Prefix:
    """What PEFT's model has learnt, as a prefix of ours; the base is given back as it was."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # PEFT's prompts are beside the base's model, not in it: there is nothing to take out
        base.model.set_attn_implementation("sdpa")
        base.model.requires_grad_(False)
        return import_peft(folder, base)
