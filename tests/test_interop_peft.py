from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import DECODER_ONLY, ENCODER_DECODER, PAD, WINDOWED, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

import foreword.interop.peft
from foreword.attach import attach
from foreword.bases import Base
from foreword.errors import ForewordError, PrefixFileError, SettingsError, WrongBaseError
from foreword.interop.peft import export_peft, import_peft
from foreword.prefix import Card, Framing, Prefix

# PEFT 0.21 still calls this property by the name that transformers 5.23 renames
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

P, B, T = 5, 3, 13
WINDOW = P + T
"""Just enough for the last token to see the prefix's first vector, so that PEFT's prefix and ours agree."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def model_of(family: str, **config: Any) -> PreTrainedModel:
    return tiny_model(family, **({"sliding_window": WINDOW} if family in WINDOWED else {}), **config)


def base_of(family: str, **config: Any) -> Base:
    return Base(model=model_of(family, **config), tokenizer=tiny_tokenizer(family), name=f"tiny-{family}")


def peft_of(family: str, *, projected: bool = False, **settings: Any) -> PeftModel:
    """A PEFT model as after training: every number of its prefix random."""
    torch.manual_seed(7)
    config = PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM" if family in ENCODER_DECODER else "CAUSAL_LM",
        num_virtual_tokens=P,
        prefix_projection=projected,
        encoder_hidden_size=11 if projected else None,
        **settings,
    )
    model = get_peft_model(model_of(family), config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 0.7)
    return model


def prefix_of(base: Base, dtype: torch.dtype = torch.float32) -> Prefix:
    generator = torch.Generator().manual_seed(11)
    shapes = base.shapes["decoder"]
    layers = [tuple(torch.randn(groups, P, dim, generator=generator).to(dtype) for _ in "kv") for groups, dim in shapes]
    return Prefix({"decoder": layers}, Card(base=base.name, fingerprint=base.fingerprint))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT writes for the tiny Llama."""
    folder = tmp_path_factory.mktemp("peft") / "llama"
    peft_of("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama() -> Base:
    return base_of("llama")


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to damage."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder


def rewrite(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def tokens_and_masks() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(3))
    right = (torch.arange(T) < torch.tensor([T, 7, 1])[:, None]).long()
    return tokens, {"none": torch.ones_like(right), "right": right, "left": right.flip(1)}


@torch.no_grad()
def assert_same_logits(ours: PreTrainedModel, peft: PeftModel, prefix: Prefix, *, bare: PreTrainedModel) -> None:
    tokens, masks = tokens_and_masks()
    without = bare(input_ids=tokens).logits
    with attach(ours, prefix):
        got = ours(input_ids=tokens).logits
        torch.testing.assert_close(got, peft(input_ids=tokens).logits, atol=1e-4, rtol=0)
        assert (got - without).abs().mean() > 0.1
        for padding, mask in masks.items():
            # left alone, transformers counts the padding of a plain forward
            places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if padding == "left" else {}
            got = ours(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
            expected = peft(input_ids=tokens, attention_mask=mask, **places).logits[mask.bool()]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def assert_same_generation(ours: PreTrainedModel, peft: PeftModel, prefix: Prefix) -> None:
    """Greedy, in a left-padded batch: the same tokens, from the same logits at every step."""
    tokens, masks = tokens_and_masks()
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    # the window holds the prefix, x and y
    inputs = {"input_ids": tokens[:, -T + 6 :], "attention_mask": masks["left"][:, -T + 6 :]}
    expected = peft.generate(**inputs, **settings)
    with attach(ours, prefix):
        got = ours.generate(**inputs, **settings)
    assert got.sequences.shape == (B, T)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("projected", [False, True], ids=["direct", "projected"])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_an_imported_prefix_gives_pefts_own_logits(family: str, projected: bool, tmp_path: Path) -> None:
    theirs = peft_of(family, projected=projected)
    theirs.save_pretrained(tmp_path)
    base = base_of(family)
    prefix = import_peft(tmp_path, base)
    assert prefix.length == P
    assert prefix.shapes == base.shapes
    assert_same_logits(base.model, theirs, prefix, bare=model_of(family))
    assert_same_generation(base.model, theirs, prefix)


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_peft_loads_an_exported_prefix_and_gives_our_logits(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    prefix = prefix_of(base)
    export_peft(prefix, base, tmp_path / "new" / "folder")
    theirs = PeftModel.from_pretrained(model_of(family), tmp_path / "new" / "folder").eval()
    assert_same_logits(base.model, theirs, prefix, bare=model_of(family))
    assert_same_generation(base.model, theirs, prefix)


def test_beyond_a_sliding_window_pefts_prefix_is_out_of_sight_and_ours_is_not(tmp_path: Path) -> None:
    window = P + 4
    base = Base(model=tiny_model("mistral", sliding_window=window), tokenizer=tiny_tokenizer("mistral"), name="tiny")
    prefix = prefix_of(base)
    export_peft(prefix, base, tmp_path / "out")
    theirs = PeftModel.from_pretrained(tiny_model("mistral", sliding_window=window), tmp_path / "out").eval()
    tokens, _ = tokens_and_masks()
    with torch.no_grad(), attach(base.model, prefix):
        apart = (base.model(input_ids=tokens).logits - theirs(input_ids=tokens).logits).abs().amax((0, 2))
    assert (apart[:4] < 1e-4).all()
    assert (apart[4:] > 1e-2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(dtype: torch.dtype, llama: Base, tmp_path: Path) -> None:
    prefix = prefix_of(llama, dtype)
    export_peft(prefix, llama, tmp_path)
    back = import_peft(tmp_path, llama)
    for ours, theirs in zip(prefix.sections["decoder"], back.sections["decoder"], strict=True):
        for was, came in zip(ours, theirs, strict=True):
            assert came.dtype == torch.float32
            assert torch.equal(was.float(), came)
    back.save(tmp_path / "prefix.safetensors", torch.float32)
    assert Prefix.load(tmp_path / "prefix.safetensors", llama).length == P


def test_an_export_is_what_peft_itself_writes(llama: Base, tmp_path: Path) -> None:
    export_peft(prefix_of(llama), llama, tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [CONFIG, WEIGHTS]
    PeftModel.from_pretrained(model_of("llama"), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    assert ours == theirs
    fresh = peft_of("llama")
    fresh.save_pretrained(tmp_path / "fresh")
    fresh_config = json.loads((tmp_path / "fresh" / CONFIG).read_text())
    assert {**fresh_config, "peft_version": ours["peft_version"]} == ours
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


def test_the_card_of_an_imported_prefix(checkpoint: Path, llama: Base) -> None:
    card = import_peft(checkpoint, llama).card
    assert (card.base, card.fingerprint) == ("tiny-llama", llama.fingerprint)
    assert card.init == "imported from PEFT"
    assert card.framing == Framing()
    config = json.loads((checkpoint / CONFIG).read_text())
    assert card.training == {"peft_version": config["peft_version"], "prefix_projection": False}
    framing = Framing(template="{name}: ")
    assert import_peft(checkpoint, llama, framing=framing).card.framing == framing


def test_the_card_names_the_base_that_peft_named(damaged: Path, llama: Base) -> None:
    rewrite(damaged, base_model_name_or_path="someone/llama")
    assert import_peft(damaged, llama).card.training["base_model_name_or_path"] == "someone/llama"


def test_an_export_names_the_base_as_transformers_loaded_it(tmp_path: Path) -> None:
    base = base_of("llama")
    base.model.name_or_path = "someone/llama"
    export_peft(prefix_of(base), base, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "someone/llama"


def test_an_imported_prefix_does_not_hang_on_the_file(damaged: Path, llama: Base) -> None:
    prefix = import_peft(damaged, llama)
    before = prefix.sections["decoder"][0][0].clone()
    size = (damaged / WEIGHTS).stat().st_size
    with (damaged / WEIGHTS).open("rb+") as file:
        file.write(b"\0" * size)
    assert torch.equal(prefix.sections["decoder"][0][0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read(dtype: torch.dtype, damaged: Path, llama: Base) -> None:
    stored = load_file(damaged / WEIGHTS)["prompt_embeddings"].to(dtype)
    save_file({"prompt_embeddings": stored}, damaged / WEIGHTS)
    keys, values = import_peft(damaged, llama).sections["decoder"][2]
    row = stored.float()[3].view(3, 2, 2, 14)
    assert torch.equal(keys[:, 3], row[2, 0])
    assert torch.equal(values[:, 3], row[2, 1])


def test_peft_need_not_be_installed(checkpoint: Path, llama: Base, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError):
        importlib.import_module("peft")
    spec = importlib.util.spec_from_file_location("fresh", foreword.interop.peft.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    fresh.export_peft(fresh.import_peft(checkpoint, llama), llama, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()


# what is refused on the way in


def refused(folder: Path, base: Base, kind: type[ForewordError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        import_peft(folder, base)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 600 + len(str(folder))
    for word in words:
        assert word in message


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_an_encoder_decoders_checkpoint_is_refused(family: str, llama: Base, tmp_path: Path) -> None:
    peft_of(family).save_pretrained(tmp_path)
    for base in (base_of(family), llama):
        refused(tmp_path, base, PrefixFileError, "encoder-decoder's", "doubles and splits", "cross-attention")


def test_an_encoder_decoder_base_is_refused(checkpoint: Path) -> None:
    refused(checkpoint, base_of("t5"), PrefixFileError, "decoder-only base", "'tiny-t5' is an encoder-decoder")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "'LORA'"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P), "'PROMPT_TUNING'"),
    ],
)
def test_other_peft_types_are_refused_by_name(config: Any, name: str, llama: Base, tmp_path: Path) -> None:
    get_peft_model(model_of("llama"), copy.deepcopy(config)).save_pretrained(tmp_path)
    refused(tmp_path, llama, PrefixFileError, "expected a checkpoint of the PEFT type 'PREFIX_TUNING'", name)


def test_a_pickle_is_refused_and_never_read(llama: Base, tmp_path: Path) -> None:
    peft_of("llama").save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nabort\n(tR.")
    refused(tmp_path, llama, PrefixFileError, "adapter_model.bin, a pickle", "save_pretrained(new_folder)")


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"num_hidden_layers": 2}, "num_layers 2, num_attention_heads 2, token_dim 28"),
        ({"num_key_value_heads": 3}, "num_layers 3, num_attention_heads 3, token_dim 42"),
        ({"head_dim": 10}, "num_layers 3, num_attention_heads 2, token_dim 20"),
    ],
)
def test_another_bases_shapes_are_refused(config: Any, sizes: str, checkpoint: Path, llama: Base) -> None:
    model_config = copy.deepcopy(llama.model.config)
    for name, value in config.items():
        setattr(model_config, name, value)
    other = Base(model=type(llama.model)(model_config), tokenizer=llama.tokenizer, name="other")
    refused(
        checkpoint,
        other,
        WrongBaseError,
        f"expected {sizes} for the base 'other'",
        "the checkpoint has num_layers 3, num_attention_heads 2, token_dim 28",
    )


def with_unequal_layers() -> Base:
    model = model_of("llama")
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 3
    layer = model.model.layers[1]
    layer.self_attn = type(layer.self_attn)(config, 1)
    return Base(model=model, tokenizer=tiny_tokenizer("llama"), name="uneven")


def test_a_base_of_unequal_layers_is_refused(checkpoint: Path) -> None:
    refused(checkpoint, with_unequal_layers(), PrefixFileError, "'uneven' has layers of 2x14 and 3x14")


def test_no_such_folder(llama: Base, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"no PEFT checkpoint at {tmp_path / 'nowhere'}")):
        import_peft(tmp_path / "nowhere", llama)


def test_a_file_and_an_empty_folder_are_no_checkpoints(checkpoint: Path, llama: Base, tmp_path: Path) -> None:
    refused(checkpoint / WEIGHTS, llama, PrefixFileError, CONFIG, "cannot be read (Not a directory)")
    refused(tmp_path, llama, PrefixFileError, CONFIG, "cannot be read (No such file or directory)")
    (tmp_path / CONFIG).mkdir()
    refused(tmp_path, llama, PrefixFileError, CONFIG, "cannot be read (Is a directory)")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "expected adapter_config.json to be JSON in UTF-8"),
        (b'{"peft_type": "PREFIX_TUNING", ', "expected adapter_config.json to be JSON in UTF-8"),
        (b'{"peft_type": "\xff\xfe"}', "expected adapter_config.json to be JSON in UTF-8"),
        (b'{"peft_version": "\\ud800"}', "expected adapter_config.json to be JSON in UTF-8"),
        (b"[" * 50_000, "expected adapter_config.json to be JSON in UTF-8"),
        (b'{"num_layers": ' + b"9" * 5000 + b"}", "expected adapter_config.json to be JSON in UTF-8"),
        (b'["PREFIX_TUNING"]', "a JSON object; got ['PREFIX_TUNING']"),
        (b" " * 70_000, "under 65536 bytes"),
        (b"{}", "the PEFT type 'PREFIX_TUNING'; got None"),
        (b'{"peft_type": ["PREFIX\\n_TUNING"]}', "got ['PREFIX\\n_TUNING']"),
    ],
)
def test_broken_configurations_are_refused(raw: bytes, words: str, damaged: Path, llama: Base) -> None:
    (damaged / CONFIG).write_bytes(raw)
    refused(damaged, llama, PrefixFileError, words)


@pytest.mark.parametrize("name", ["num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"])
@pytest.mark.parametrize("value", [..., None, 0, -3, 2.0, True, "2", [3], float("nan")])
def test_sizes_must_be_positive_integers(name: str, value: Any, damaged: Path, llama: Base) -> None:
    rewrite(damaged, **{name: value})
    got = None if value is ... else value
    refused(damaged, llama, PrefixFileError, f"expected {name} in {CONFIG} to be a positive integer; got {got!r}")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task_type": "SEQ_CLS"}, "got 'SEQ_CLS' and 1"),
        ({"task_type": ...}, "got None and 1"),
        ({"num_transformer_submodules": ...}, "got 'CAUSAL_LM' and None"),
        ({"num_transformer_submodules": "x" * 5000}, "got 'CAUSAL_LM' and 'xxx"),
    ],
)
def test_other_tasks_are_refused(fields: Any, words: str, damaged: Path, llama: Base) -> None:
    rewrite(damaged, **fields)
    refused(damaged, llama, PrefixFileError, "task_type 'CAUSAL_LM' and num_transformer_submodules 1", words)


@pytest.mark.parametrize("length", [P + 1, 10**4000])
def test_a_configuration_of_another_length_is_refused(length: int, damaged: Path, llama: Base) -> None:
    rewrite(damaged, num_virtual_tokens=length)
    refused(
        damaged,
        llama,
        PrefixFileError,
        f"expected 'prompt_embeddings' of shape [{str(length)[:50]}",
        "[5, 168]",
    )


def test_truncated_and_foreign_weights_are_refused(damaged: Path, llama: Base) -> None:
    raw = (damaged / WEIGHTS).read_bytes()
    for bad in (b"", raw[:5], raw[:60], raw[:-1], b"\xff" * 8 + raw[8:], os.urandom(300), b"PK\3\4" + raw):
        (damaged / WEIGHTS).write_bytes(bad)
        refused(damaged, llama, PrefixFileError, f"expected {WEIGHTS} to be a safetensors file")
    (damaged / WEIGHTS).unlink()
    refused(damaged, llama, PrefixFileError, f"expected {WEIGHTS} to be a safetensors file; it is missing")
    (damaged / WEIGHTS).mkdir()
    refused(damaged, llama, PrefixFileError, f"expected {WEIGHTS} to be a safetensors file")


def test_missing_and_additional_tensors_are_refused(damaged: Path, llama: Base) -> None:
    stored = load_file(damaged / WEIGHTS)
    head = {"base_model.lm_head.weight": torch.zeros(2, 3)}
    for tensors in ({}, head, {**stored, **head}, {f"{'n' * 300}\n{i}": torch.zeros(1) for i in range(7)}):
        save_file(tensors, damaged / WEIGHTS)
        refused(
            damaged,
            llama,
            PrefixFileError,
            f"expected the one tensor 'prompt_embeddings' in {WEIGHTS}; got [",
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float, damaged: Path, llama: Base) -> None:
    stored = load_file(damaged / WEIGHTS)["prompt_embeddings"]
    stored[P - 1, -1] = bad
    save_file({"prompt_embeddings": stored}, damaged / WEIGHTS)
    refused(damaged, llama, PrefixFileError, "decoder.2: expected finite", "numbers")


def test_integers_are_refused(damaged: Path, llama: Base) -> None:
    save_file({"prompt_embeddings": torch.zeros(P, 168, dtype=torch.int32)}, damaged / WEIGHTS)
    refused(damaged, llama, PrefixFileError, "floating-point numbers; got torch.int32")


# what is refused on the way out


def test_a_prefix_of_another_base_is_not_exported(llama: Base, tmp_path: Path) -> None:
    other = Base(model=tiny_model("llama", seed=1), tokenizer=llama.tokenizer, name="other")
    with pytest.raises(WrongBaseError, match=r"expected a prefix for the base 'other'.*'tiny-llama'"):
        export_peft(prefix_of(llama), other, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_infix_is_not_exported(llama: Base, tmp_path: Path) -> None:
    prefix = prefix_of(llama)
    infix = Prefix(prefix.sections, dataclasses.replace(prefix.card, training={"infix": True}))
    with pytest.raises(PrefixFileError, match="expected a prefix; got an infix"):
        export_peft(infix, llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unequal_layers_are_not_exported(tmp_path: Path) -> None:
    base = with_unequal_layers()
    prefix = prefix_of(base)
    assert prefix.shapes["decoder"] == [(2, 14), (3, 14), (2, 14)]
    with pytest.raises(PrefixFileError, match="'uneven' has layers of 2x14 and 3x14"):
        export_peft(prefix, base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_an_encoder_decoders_prefix_is_not_exported(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    sections = {
        section: [(torch.zeros(groups, P, dim), torch.zeros(groups, P, dim)) for groups, dim in shapes]
        for section, shapes in base.shapes.items()
    }
    prefix = Prefix(sections, Card(base=base.name, fingerprint=base.fingerprint))
    with pytest.raises(PrefixFileError, match=f"'tiny-{family}' is an encoder-decoder, whose prefix has three"):
        export_peft(prefix, base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_stays_as_it_is(llama: Base, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "theirs").write_text("kept")
    for taken in (tmp_path / "used", tmp_path / "used" / "theirs"):
        with pytest.raises(SettingsError, match=f"expected a new or empty folder to export to; {taken} is in use"):
            export_peft(prefix_of(llama), llama, taken)
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "theirs"]
    assert (tmp_path / "used" / "theirs").read_text() == "kept"


def test_an_export_that_fails_leaves_nothing(llama: Base, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # room for the configuration alone
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_peft(prefix_of(llama), llama, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_written(llama: Base, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    export_peft(prefix_of(llama), llama, "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert import_peft("link", llama).length == P
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
