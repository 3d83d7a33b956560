"""The families of bases: where each has its attention layers, and the shapes of their keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foreword.errors import BaseLoadError

__all__ = ["FAMILIES", "OF_TEXT_AND_IMAGES", "section_shapes", "sections_of"]

_CAUSAL = {"decoder": "model.layers.*.self_attn"}
_BART = {
    "encoder": "model.encoder.layers.*.self_attn",
    "decoder": "model.decoder.layers.*.self_attn",
    "cross": "model.decoder.layers.*.encoder_attn",
}
_T5 = {
    "encoder": "encoder.block.*.layer.0.SelfAttention",
    "decoder": "decoder.block.*.layer.0.SelfAttention",
    "cross": "decoder.block.*.layer.1.EncDecAttention",
}
FAMILIES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {"decoder": "transformer.h.*.attn"},
    "opt": {"decoder": "model.decoder.layers.*.self_attn"},
    "gpt_neox": {"decoder": "gpt_neox.layers.*.attention"},
    "llama": _CAUSAL,
    "mistral": _CAUSAL,
    "smollm3": _CAUSAL,
    "qwen2": _CAUSAL,
    "qwen3": _CAUSAL,
    "gemma2": _CAUSAL,
    "gemma3_text": _CAUSAL,
    "phi3": _CAUSAL,
    "olmo2": _CAUSAL,
    "olmo3": _CAUSAL,
    "granite": _CAUSAL,
    "ministral3": _CAUSAL,
    "mixtral": _CAUSAL,
    "qwen3_moe": _CAUSAL,
    "bart": _BART,
    "pegasus": _BART,
    "t5": _T5,
    "mt5": _T5,
}
"""For each supported `config.model_type`, where the attention layers of each section are; `*` is the layer's number."""

OF_TEXT_AND_IMAGES = ("gemma3", "mistral3")
"""Values of `config.model_type` whose part for text is a base, of one of the families, by itself."""


def sections_of(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The attention layers of each section, in order.

    Raises:
        BaseLoadError: the model is not of a supported family.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise BaseLoadError(
            f"expected a base of one of the families {', '.join(FAMILIES)}; got {model.config.model_type!r}"
        )
    sections = {}
    for section, pattern in family.items():
        stem, _, leaf = pattern.partition(".*.")
        try:
            sections[section] = [layer.get_submodule(leaf) for layer in model.get_submodule(stem).children()]
            if model.get_output_embeddings() is None:
                raise AttributeError
        except AttributeError:
            raise BaseLoadError(
                f"expected a language model with attention at {pattern}; got {type(model).__name__}: load it with "
                "foreword.load_base, or as AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            ) from None
    return sections


def section_shapes(model: PreTrainedModel) -> dict[str, list[tuple[int, int]]]:
    """For each section, (G, D) of each layer: its number of key/value heads and its head dimension."""

    def shape(module: Any) -> tuple[int, int]:
        dim = _first(module, "key_value_proj_dim", "head_dim", "head_size")
        projection = _first(module, "k_proj", "k")
        if projection is not None:
            return projection.out_features // dim, dim
        # one projection makes queries, keys and values
        return getattr(module, "num_key_value_heads", module.config.num_attention_heads), dim

    return {section: [shape(module) for module in modules] for section, modules in sections_of(model).items()}


def _first(module: Any, *names: str) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
