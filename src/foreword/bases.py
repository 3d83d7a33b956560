"""Bases: frozen language models, loaded by name.

A base is a transformer with all its parameters frozen, and its tokenizer. Nothing foreword does changes one
byte of it. Its name is a Hugging Face hub id, a local folder, a local `.gguf` file, or a built-in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub.utils as hub
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from foreword.builtin import BUILT_IN, cache_folder, progress_bar
from foreword.errors import BaseLoadError, ForewordError, MissingExtraError, SettingsError, one_line
from foreword.families import FAMILIES, OF_TEXT_AND_IMAGES, section_shapes, sections_of

__all__ = ["DTYPES", "Base", "built_in_folder", "cache_folder", "load_base"]

_KINDS = f"a local folder, a .gguf file, a hub id (owner/name) or a built-in ({', '.join(BUILT_IN)})"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The names that `load_base` takes for a dtype, beside `auto`."""

_TEXT_ALONE = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Names of weights in files of models of text and images, old and new, to those of the text's own model."""

SIGNS = 4096
"""How many numbers of each parameter the fingerprint looks at."""

_TOLD = (
    *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim", "d_kv"),
    *("encoder_attention_heads", "decoder_attention_heads", "query_pre_attn_scalar", "sliding_window"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "attn_logit_softcapping"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    *("activation_function", "hidden_act", "hidden_activation", "feed_forward_proj"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "do_layer_norm_before", "scale_embedding"),
    *("final_logit_softcapping", "no_rope_layers", "use_parallel_residual", "num_experts_per_tok", "norm_topk_prob"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
)
"""Configuration values that change what a base computes, and that the shapes of its weights don't show."""

_TOLD_OF_ROPE = (
    *("rope_type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"),
    *("short_factor", "long_factor", "mscale", "mscale_all_dim", "truncate", "llama_4_scaling_beta"),
)


@dataclass(frozen=True, eq=False)
class Base:
    """A transformer with all its parameters frozen, and its tokenizer.

    Making one freezes the model: no parameter requires a gradient, it is in evaluation mode, and its dropout
    is off in training mode too.

    Args:
        model: a causal or sequence-to-sequence language model of a supported family.
        tokenizer: the one it was trained with.
        name: for people; what `load_base` was given.

    Raises:
        BaseLoadError: the model's family is not supported, or its weights are quantized.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def __post_init__(self) -> None:
        sections_of(self.model)
        _refuse_quantized(self.name, getattr(self.model.config, "quantization_config", None))
        self.model.requires_grad_(False)
        self.model.eval()
        _without_dropout(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def embeddings(self) -> torch.Tensor:
        """The input embeddings, [V, hidden size]."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The base's own, tied ones once; an attached trainable prefix is the model's submodule `foreword`."""
        return {name: p for name, p in self.model.named_parameters() if not name.startswith("foreword.")}

    @cached_property
    def shapes(self) -> dict[str, list[tuple[int, int]]]:
        """For each section, (G, D) of each layer: its number of key/value heads and its head dimension."""
        return section_shapes(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """What a prefix file knows its base by: 64 hexadecimal digits.

        SHA-256 over the configuration values that weights don't show (family, heads, rotary parameters,
        windows, activation, ...) and over each parameter's name, its shape, and the signs of up to 4096 of
        its numbers, at even steps from the first on. Rounding to another dtype keeps a number's sign, even
        where the number becomes zero, so the fingerprint is the same whatever dtype the base was loaded in.
        And so few numbers are read quickly from a base of 70 billion, too. Training or quantizing a base
        flips signs near zero, which changes the fingerprint; a change that flips none of those read does not
        show.
        """
        digest = hashlib.sha256(json.dumps(_told(self.model.config), sort_keys=True).encode())
        tensors: dict[str, torch.Tensor] = {**self.parameters}
        # BART's buffer, told only where it is not zero, as it ordinarily is
        bias = getattr(self.model, "final_logits_bias", None)
        if bias is not None and bias.any():
            tensors["final_logits_bias"] = bias
        for name, parameter in sorted(tensors.items()):
            digest.update(f"{name} {list(parameter.shape)} ".encode())
            digest.update(_signs(parameter.detach()).cpu().numpy().tobytes())
        return digest.hexdigest()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of y's tokens, without special ones."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @property
    def context(self) -> int | None:
        """The most positions, P included in a decoder-only base; None where they are relative (T5).

        With rotary factors of two kinds (`longrope`), those of the first: beyond, one long row would change the others.
        """
        config = self.model.config
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
        return getattr(config, "max_position_embeddings", None)

    @property
    def end_id(self) -> int:
        """Id of the end token, with which every y ends.

        Raises:
            BaseLoadError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise BaseLoadError(
                f"expected a tokenizer with an end token; that of {self.name!r} has none: set eos_token in "
                "its tokenizer_config.json"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def start_id(self) -> int:
        """Id of the token with which an encoder-decoder base's decoder begins.

        Raises:
            BaseLoadError: neither configuration names it.
        """
        configs = (self.model.config, self.model.generation_config)
        known = (getattr(config, "decoder_start_token_id", None) for config in configs)
        start = next((token for token in known if token is not None), None)
        if start is None:
            raise BaseLoadError(
                f"expected a base that says how its decoder begins; {self.name!r} does not: set decoder_start_token_id in its "
                "config.json"
            )
        return int(start)

    @property
    def pad_id(self) -> int:
        """What rows are filled with: the padding token, else the end token. Masks say what is padding."""
        pad = self.tokenizer.pad_token_id
        # one that was added to the tokenizer alone has no embedding
        return self.end_id if pad is None or pad >= len(self.embeddings) else int(pad)


def _told(config: PreTrainedConfig) -> dict[str, Any]:
    """The values in `_TOLD`: what a newer transformers adds to its configurations changes no fingerprint."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        # six digits: a GGUF file keeps 1e-5 as a float32
        return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else value

    rope = getattr(config, "rope_parameters", None) or {}
    told = {key: getattr(config, key, None) for key in _TOLD}
    told["rope"] = {
        key: {k: v for k, v in value.items() if k in _TOLD_OF_ROPE} if isinstance(value, dict) else value
        for key, value in rope.items()
        if isinstance(value, dict) or key in _TOLD_OF_ROPE
    }
    # what follows is told only where it is out of the ordinary: prefix files hold the others' fingerprints
    if any(one.get("rope_type") == "dynamic" for one in (rope, *rope.values()) if isinstance(one, dict)):
        told["max_position_embeddings"] = config.max_position_embeddings
    # T5 scales, and T5 1.1, whose layers are gated, does not
    scaled, gated = (getattr(config, key, None) for key in ("scale_decoder_outputs", "is_gated_act"))
    told["scale_decoder_outputs"] = scaled if scaled == gated else None
    # where all layers are of one type, sliding_window says which
    types = getattr(config, "layer_types", None) or []
    usual = "full_attention" if told["sliding_window"] is None else "sliding_attention"
    told["layer_types"] = None if set(types) <= {usual} else list(types)
    return {"model_type": config.model_type, **plain(told)}


def _signs(parameter: torch.Tensor) -> torch.Tensor:
    """The signs of up to 4096 numbers, at even steps from the first on: [n] of bool.

    The step that a small matrix allows may be short of a third of it, which leaves its end unread.
    """
    count = parameter.numel()
    step = max(1, count // SIGNS)
    # a step that shares no factor with the shape runs through every column
    while math.gcd(step, count) > 1:
        step -= 1
    return torch.signbit(parameter.reshape(-1)[::step][:SIGNS])


def _without_dropout(model: nn.Module) -> None:
    """A frozen base is a function, in training mode too, without which there is no gradient checkpointing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "jitter_noise"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)


def _refuse_quantized(name: str, quantization: Any) -> None:
    if quantization is not None:
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        method = quantization.get("quant_method", "unknown")
        raise BaseLoadError(
            f"expected plain weights; {name!r} is quantized ({getattr(method, 'value', method)}): load the "
            "unquantized model, or a .gguf file, which is unpacked when loaded"
        )


def load_base(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Base:
    """Load a frozen base.

    Args:
        name: a built-in (`smollm2-135m`), a local folder, a local `.gguf` file, or a Hugging Face hub id. A
            folder here that has a built-in's name is written with `./`.
        dtype: of the weights: `bfloat16`, `float16`, `float32` or a `torch.dtype`. Default, or `auto`:
            bfloat16 where the device computes in it, else float32.
        device: as torch names it. Default: `cuda` where there is one, else `cpu`.

    Returns:
        the base, frozen, in evaluation mode.

    Raises:
        BaseLoadError: there is no such model, its files are damaged, its family is not supported, or it is
            quantized.
        MissingExtraError: it is in a GGUF file, and the package `gguf` is not installed.
        SettingsError: no such dtype or device.
    """
    name = os.fspath(name)
    device = _device(device)
    dtype = _dtype(dtype, device)
    # unlike pathlib's, these take what no path can be for one that isn't there
    path = Path(os.path.expanduser(name))
    gguf = None
    if name in BUILT_IN:
        path = built_in_folder(name)
        where, cure = str(path), f"delete {path} and run this again"
    elif os.path.isdir(path):
        where, cure = str(path), "give a folder that save_pretrained wrote, whole, with its tokenizer"
        if not (path / "config.json").is_file():
            raise BaseLoadError(f"expected a model's folder; {name!r} has no config.json: {cure}")
    elif os.path.isfile(path) and path.suffix.lower() == ".gguf":
        where, gguf, cure = str(path.parent), path.name, "is it a whole GGUF file? download it again"
    elif os.path.isfile(path):
        raise BaseLoadError(f"expected {_KINDS}; {name!r} is another kind of file")
    elif path.suffix.lower() == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise BaseLoadError(f"no model at {name!r}: expected {_KINDS}")
    else:
        where, cure = name, f"check the name and the network, or give {_KINDS}"
    return Base(*_load(name, where, dtype, device, cure=cure, gguf=gguf), name)


def built_in_folder(name: str) -> Path:
    """The transformers folder of a built-in base, made the first time; see `BuiltIn.folder`."""

    def convert(gguf: Path, folder: Path) -> None:
        # the file's numbers fit no shorter dtype; rounded here, a base in float32 would not be the file's
        model, tokenizer = _load(
            name, str(gguf.parent), torch.float32, torch.device("cpu"), cure="run this again", gguf=gguf.name
        )
        with _quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return BUILT_IN[name].folder(convert)


def _load(
    name: str, where: str, dtype: torch.dtype, device: torch.device, *, cure: str, gguf: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder, a GGUF file in it, or the hub; any failure is one line."""
    # code that comes with a model is never run; None would ask on the terminal
    options: dict[str, Any] = {"trust_remote_code": False}
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError("gguf", "gguf")
        options["gguf_file"] = gguf
    try:
        with _quiet(unpacking=gguf):
            # looked at before the weights are fetched: those may be gigabytes
            raw, _ = PreTrainedConfig.get_config_dict(where, **options)
            family = raw.get("model_type")
            if family not in (*FAMILIES, *OF_TEXT_AND_IMAGES):
                raise BaseLoadError(
                    f"expected a base of one of the families {', '.join(FAMILIES)}; {name!r} is of {family!r}"
                )
            _refuse_quantized(name, raw.get("quantization_config"))
            config = CONFIG_MAPPING[family].from_dict(raw)
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            if family in OF_TEXT_AND_IMAGES:
                tied, config = config.tie_word_embeddings, config.get_text_config()
                config.tie_word_embeddings, options["key_mapping"] = tied, _TEXT_ALONE
            auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            if gguf is not None:
                options["quantization_config"] = GgufConfig(gguf_file=gguf, dequantize=True)
            model, info = auto.from_pretrained(where, config=config, dtype=dtype, output_loading_info=True, **options)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise BaseLoadError(f"{name!r} lacks {len(missing)} of its weights, the first {missing[0]}: {cure}")
        return model.to(device), tokenizer
    except ForewordError:
        raise
    except torch.OutOfMemoryError:
        raise BaseLoadError(
            f"{name!r} in {dtype} does not fit on {device}: choose a smaller base, or another dtype or device"
        ) from None
    except Exception as error:  # transformers, tokenizers, safetensors, gguf and the hub raise what they like
        raise BaseLoadError(f"cannot load {name!r} ({one_line(error)}): {cure}") from error


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"expected a device of this machine, such as cpu; got {str(device)!r} ({one_line(error)})"
        ) from None
    return device


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise SettingsError(f"expected dtype to be one of auto, {', '.join(DTYPES)}; got {str(dtype)!r}")
    return DTYPES[str(dtype)]


def _computes_in_bfloat16(device: torch.device) -> bool:
    """A processor without instructions for bfloat16 is slower in it than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # older versions of torch can't tell, and some builds (macOS) don't use what the processor has
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    )


@contextmanager
def _quiet(unpacking: str | None = None) -> Iterator[None]:
    """Keep transformers' remarks and bars off the terminal, but for its downloads from the hub.

    What must be known, such as missing weights, is asked for and raised. While a GGUF file of that name is
    unpacked, our bar stands in for its reader's, which no setting turns off.
    """
    level, hub_level = logging.get_verbosity(), hub.logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    logging.disable_progress_bar()
    if hub_bars:
        hub.enable_progress_bars()
    try:
        if unpacking is None:
            yield
        else:
            with progress_bar() as progress, redirect_stderr(io.StringIO()):
                progress.add_task(f"unpacking {unpacking}", total=None)
                yield
    finally:
        logging.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
        if not hub_bars:
            hub.disable_progress_bars()
