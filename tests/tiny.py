"""Tiny random models of every family, built in code. Sizes are unequal primes, or their products, so that a swapped axis fails."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from foreword.bases import Base
from foreword.families import section_shapes
from foreword.prefix import Card, Prefix

VOCAB = 263
"""A byte each, and seven special ones."""
PAD, BOS, EOS = 256, 257, 258
CONTEXT = 131

_ids: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCAB}
_grouped: dict[str, Any] = {
    "hidden_size": 6 * 14,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": CONTEXT,
    **_ids,
}


_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6}
"""Of a head's 14 numbers, 8 are turned."""


def _gpt2(**more: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": 5 * 14, "n_layer": 3, "n_head": 5, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **_ids, **more}))


def _opt(**more: Any) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=5 * 14,
            ffn_dim=37,
            num_hidden_layers=3,
            num_attention_heads=5,
            word_embed_proj_dim=22,
            max_position_embeddings=CONTEXT,
            **_ids,
            **more,
        )
    )


def _llama(**more: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_grouped, **more}))


def _mistral(**more: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**_grouped, "sliding_window": 7, **more}))


def _qwen3(**more: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**_grouped, **more}))


_windows: dict[str, Any] = {
    **_grouped,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def _gemma2(**more: Any) -> PreTrainedModel:
    caps: dict[str, Any] = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}
    return Gemma2ForCausalLM(Gemma2Config(**{**_windows, "query_pre_attn_scalar": 14, **caps, **more}))


def _gemma3(**more: Any) -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_windows, "query_pre_attn_scalar": 14, **more}))


def _gpt_neox(**more: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 5 * 14, "intermediate_size": 37, "max_position_embeddings": CONTEXT}
    heads: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 5, "rope_parameters": _PARTIAL}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, **heads, **_ids, **more}))


def _smollm3(**more: Any) -> PreTrainedModel:
    return SmolLM3ForCausalLM(SmolLM3Config(**{**_grouped, "no_rope_layer_interval": 2, **more}))


def _qwen2(**more: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_grouped, **more}))


def _phi3(**more: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**{**_grouped, "rope_parameters": _PARTIAL, **more}))


def _olmo2(**more: Any) -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**{**_grouped, **more}))


def _olmo3(**more: Any) -> PreTrainedModel:
    return Olmo3ForCausalLM(Olmo3Config(**{**_windows, **more}))


def _granite(**more: Any) -> PreTrainedModel:
    own = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 0.7}
    return GraniteForCausalLM(GraniteConfig(**{**_grouped, **own, **more}))


def scaled_rope(first: int, context: int) -> dict[str, Any]:
    """Ministral 3's, whose queries grow by position, a step each `first` positions."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": context / first,
        "original_max_position_embeddings": first,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "llama_4_scaling_beta": 0.3,
    }


def _ministral3(**more: Any) -> PreTrainedModel:
    return Ministral3ForCausalLM(Ministral3Config(**{**_grouped, "rope_parameters": scaled_rope(16, CONTEXT), **more}))


_experts: dict[str, Any] = {
    **_grouped,
    # torch's product of groups wants rows of 16 bytes, in bfloat16, too
    "hidden_size": 88,
    "intermediate_size": 40,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}


def _mixtral(**more: Any) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**{**_experts, **more}))


def _qwen3_moe(**more: Any) -> PreTrainedModel:
    own: dict[str, Any] = {"moe_intermediate_size": 24, "mlp_only_layers": [1], "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_experts, **own, **more}))


def tiny_composite(family: str, **config: Any) -> PreTrainedModel:
    """A random model of text and images; what it computes of text alone is what the text's own model does."""
    torch.manual_seed(0)
    images: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 17,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if family == "gemma3":
        text = {**_windows, "query_pre_attn_scalar": 14}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4, image_token_index=5, **config)
        ).eval()
    text = {**_grouped, "model_type": family}
    images |= {"model_type": "pixtral", "head_dim": 8}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=images, image_token_index=5, **config)
    ).eval()


_bart_sizes: dict[str, Any] = {
    "d_model": 6 * 14,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 41,
    "max_position_embeddings": CONTEXT,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": EOS,
    **_ids,
}
_t5_sizes: dict[str, Any] = {
    "d_model": 5 * 14,
    "d_kv": 11,
    "d_ff": 37,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 19,
    "decoder_start_token_id": PAD,
    **_ids,
}


def _bart(**more: Any) -> PreTrainedModel:
    return BartForConditionalGeneration(BartConfig(**{**_bart_sizes, **more}))


def _pegasus(**more: Any) -> PreTrainedModel:
    return PegasusForConditionalGeneration(PegasusConfig(**{**_bart_sizes, **more}))


def _t5(**more: Any) -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(**{**_t5_sizes, **more}))


def _mt5(**more: Any) -> PreTrainedModel:
    return MT5ForConditionalGeneration(MT5Config(**{**_t5_sizes, **more}))


BUILDERS = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "bart": _bart,
    "t5": _t5,
    "gpt_neox": _gpt_neox,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gemma2": _gemma2,
    "olmo3": _olmo3,
    "granite": _granite,
    "ministral3": _ministral3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "pegasus": _pegasus,
    "mt5": _mt5,
}
"""By family."""
MAIN = ("gpt2", "opt", "llama", "mistral", "qwen3", "gemma3", "bart", "t5")
"""Families for tests that take long; the others take the same ways through our code as one of these."""
EXPERTS = ("mixtral", "qwen3_moe")
WINDOWED = ("mistral", "gemma3", "gemma2", "olmo3")
ENCODER_DECODER = ("bart", "t5", "pegasus", "mt5")
DECODER_ONLY = tuple(family for family in BUILDERS if family not in ENCODER_DECODER)


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A random model whose attention is far from uniform, in evaluation mode."""
    torch.manual_seed(seed)
    model = BUILDERS[family](**config)
    if dtype == torch.float64 and family in EXPERTS:
        model.set_experts_implementation("eager")  # torch's product of groups takes no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # the default of 0.02 hides mistakes: every row would look alike
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
        if family in ("gemma2", "gemma3"):
            # or it repeats the last token: embeddings are tied, and what layers add to them has one size
            model.get_input_embeddings().weight.mul_(1 / 50)
            model.model.norm.weight.fill_(50 - 1)
    return model.to(dtype).eval()


def random_prefix(model: PreTrainedModel, length: int, *, seed: int = 0) -> Prefix:
    """A prefix that a model surely feels, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(groups: int, dim: int) -> torch.Tensor:
        return torch.randn(groups, length, dim, generator=generator).to(model.dtype)

    sections = {
        section: [(tensor(groups, dim), tensor(groups, dim)) for groups, dim in layers]
        for section, layers in section_shapes(model).items()
    }
    return Prefix(sections, Card(base=f"tiny {model.config.model_type}", fingerprint="0" * 64))


def tiny_tokenizer(family: str = "gpt2") -> PreTrainedTokenizerFast:
    """A token a byte; special tokens as the family's own tokenizers put them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == 256
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    special = ["<pad>", "<s>", "</s>", "<unk>", "<a>", "<b>", "<c>"]
    vocab |= {symbol: 256 + i for i, symbol in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    frame = {
        "opt": "<s> $A",
        "llama": "<s> $A",
        "mistral": "<s> $A",
        "gemma3": "<s> $A",
        "bart": "<s> $A </s>",
        "t5": "$A </s>",
        "pegasus": "$A </s>",
        "mt5": "$A </s>",
    }
    if family in frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frame[family], special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<a>", "<b>", "<c>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def base_of(family: str, **more: Any) -> Base:
    return Base(tiny_model(family, **more), tiny_tokenizer(family), f"tiny {family}")


def base_bytes(base: Base) -> str:
    """A hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        if not name.startswith("foreword."):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refused(kind: type[Exception], message: str) -> Any:
    """A context in which an error of this kind is raised, whose one line holds `message`."""
    return pytest.raises(kind, match=rf"\A[^\n]*{message}[^\n]*\Z")
