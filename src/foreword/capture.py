"""What a base's attention layers see of a text: the keys and values that a prefix may start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from foreword.attach import lock_of
from foreword.attention import NAME, Mask
from foreword.families import sections_of
from foreword.prefix import Layer

__all__ = ["capture"]


class _Recorder:
    """Stands where an attachment does, and keeps what each attention layer sees."""

    shared = None  # rows are run as they come

    def __init__(self) -> None:
        self.seen: dict[str, dict[int, Layer]] = {}

    def extend(
        self,
        section: str,
        i: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Mask]:
        self.seen.setdefault(section, {})[i] = keys, values
        return keys, values, Mask(mask, query.shape[2], keys.shape[2])


@contextmanager
def capture(model: PreTrainedModel) -> Iterator[Mapping[str, Mapping[int, Layer]]]:
    """Record the keys and values, each [B, G, K, D], that each layer of each section attends to in the `with` block."""
    with lock_of(model):
        recorder = _Recorder()
        implementation = model.config._attn_implementation
        layers = [
            (module, (recorder, section, i))
            for section, modules in sections_of(model).items()
            for i, module in enumerate(modules)
        ]
        before = [module.__dict__.get(NAME) for module, _ in layers]
        # what a backward pass computes anew, once this block is left, would meet another attention
        checkpointed: list[Any] = [
            module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
        ]
        for layer in checkpointed:
            layer.gradient_checkpointing = False
        for module, mark in layers:
            module.__dict__[NAME] = mark
        model.set_attn_implementation(NAME)
        try:
            yield recorder.seen
        finally:
            for (module, _), earlier in zip(layers, before, strict=True):
                del module.__dict__[NAME]
                if earlier is not None:
                    module.__dict__[NAME] = earlier
            for layer in checkpointed:
                layer.gradient_checkpointing = True
            model.set_attn_implementation(implementation)
