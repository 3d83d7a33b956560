"""One prefix is one file: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import stat
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import base_of, random_prefix, tiny_model

from foreword.errors import ForewordError, PrefixFileError, SettingsError, WrongBaseError
from foreword.families import section_shapes
from foreword.prefix import FORMAT, Card, Framing, Layer, Prefix
from foreword.writing import check_file, remove_asides, write_atomically

FULL_CARD = Card(
    base="some/base",
    fingerprint="0123456789abcdef" * 4,
    framing=Framing(template="{name} | {area}\n", chat=False, max_input_tokens=17),
    init="activations",
    training={
        "lr": 0.02,
        "epochs": 5,
        "seed": 0,
        "gradient_checkpointing": False,
        "nested": {"é": [1, None]},
    },
    metrics={"dev_loss": 1.25, "rows": 3},
    created="2026-01-02T03:04:05+00:00",
)


def layers(count: int, groups: int = 3, length: int = 5, dim: int = 7, seed: int = 0) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(groups, length, dim, generator=generator),
            torch.randn(groups, length, dim, generator=generator),
        )
        for _ in range(count)
    ]


def small() -> Prefix:
    return Prefix({"decoder": layers(2)}, FULL_CARD)


def tensors_of(prefix: Prefix) -> dict[str, torch.Tensor]:
    return {
        f"{section}.{i}.{kind}": tensor
        for section, layers in prefix.sections.items()
        for i, layer in enumerate(layers)
        for kind, tensor in zip(("keys", "values"), layer, strict=True)
    }


def raw_file(header: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    """A safetensors file, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def load_bytes(folder: Path, content: bytes) -> Prefix:
    path = folder / "hostile.safetensors"
    path.write_bytes(content)
    return Prefix.load(path)


def refused(folder: Path, content: bytes, match: str) -> None:
    with pytest.raises(PrefixFileError, match=match) as caught:
        load_bytes(folder, content)
    assert str(caught.value).startswith(str(folder))
    with pytest.raises(PrefixFileError, match=match) as same:
        Prefix.from_bytes(content)
    for message in (str(caught.value), str(same.value)):
        assert "\n" not in message
        assert len(message) < 1000


# ---- there and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_a_saved_prefix_comes_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family)
    prefix = random_prefix(model, 5)
    path = tmp_path / "new" / "folders" / "p.safetensors"
    prefix.save(path, dtype)
    loaded = Prefix.load(path)
    assert loaded.card == prefix.card
    assert loaded.shapes == prefix.shapes == section_shapes(model)
    assert loaded.length == 5
    expected, found = tensors_of(prefix), tensors_of(loaded)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert loaded.to_bytes(dtype) == path.read_bytes()


def test_bfloat16_is_the_default(tmp_path: Path) -> None:
    small().save(tmp_path / "p.safetensors")
    assert Prefix.load(tmp_path / "p.safetensors").sections["decoder"][0][0].dtype == torch.bfloat16
    assert (tmp_path / "p.safetensors").read_bytes() == small().to_bytes()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"])
def test_no_file_is_of_a_dtype_that_none_is_read_in(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^expected one of torch.bfloat16, .* for the file; got '?{dtype}'?$"):
        small().save(tmp_path / "p.safetensors", dtype)
    assert list(tmp_path.iterdir()) == []


def test_layers_may_have_unequal_heads(tmp_path: Path) -> None:
    sections = {
        "encoder": [*layers(1, groups=2), *layers(1, groups=5, dim=3)],
        "decoder": layers(3, groups=1),
        "cross": [*layers(2), *layers(1, dim=11)],
    }
    prefix = Prefix(sections, FULL_CARD)
    assert prefix.num_parameters == 2 * 5 * (2 * 7 + 5 * 3 + 3 * 7 + 2 * 3 * 7 + 3 * 11)
    prefix.save(tmp_path / "p.safetensors", torch.float32)
    loaded = Prefix.load(tmp_path / "p.safetensors")
    assert loaded.shapes == {
        "encoder": [(2, 7), (5, 3)],
        "decoder": [(1, 7)] * 3,
        "cross": [(3, 7), (3, 7), (3, 11)],
    }
    for name, tensor in tensors_of(loaded).items():
        assert torch.equal(tensor, tensors_of(prefix)[name])


def test_more_than_ten_layers_keep_their_order(tmp_path: Path) -> None:
    prefix = Prefix({"decoder": layers(23)}, FULL_CARD)
    prefix.save(tmp_path / "p.safetensors", torch.float32)
    for loaded, original in zip(
        Prefix.load(tmp_path / "p.safetensors").sections["decoder"], prefix.sections["decoder"], strict=True
    ):
        assert torch.equal(loaded[0], original[0])
        assert torch.equal(loaded[1], original[1])


def test_the_same_prefix_is_the_same_bytes() -> None:
    """Every time: safetensors writes a header with several entries in an order of chance."""
    assert len({small().to_bytes() for _ in range(20)}) == 1


def test_views_and_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    """Keys and values cut out of one matrix, turned around, or the same."""
    matrix = torch.randn(2, 2, 5, 3, 7)
    cut = [(layer[0].transpose(0, 1), layer[1].transpose(0, 1)) for layer in matrix]
    same = torch.randn(3, 5, 7)
    prefix = Prefix({"decoder": [*cut, (same, same), (same[:1].expand(3, 5, 7), same)]}, FULL_CARD)
    prefix.save(tmp_path / "p.safetensors", torch.float32)
    for name, tensor in tensors_of(Prefix.load(tmp_path / "p.safetensors")).items():
        assert torch.equal(tensor, tensors_of(prefix)[name])


def test_a_trained_parameter_can_be_saved() -> None:
    keys, values = (nn_tensor.requires_grad_() for nn_tensor in layers(1)[0])
    assert Prefix({"decoder": [(keys, values)]}, FULL_CARD).to_bytes()


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    small().save(path)
    loaded = Prefix.load(path)
    before = [tensor.clone() for tensor in tensors_of(loaded).values()]
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(map(torch.equal, tensors_of(loaded).values(), before))


# ---- the card --------------------------------------------------------------------------------------------


def test_a_card_comes_back() -> None:
    assert Card.from_json(FULL_CARD.to_json()) == FULL_CARD
    assert Card.from_json(FULL_CARD.to_json()).to_json() == FULL_CARD.to_json()
    sparse = Card(base="b", fingerprint="f")
    assert Card.from_json(sparse.to_json()) == sparse
    assert sparse.created.endswith("+00:00")


def test_the_header_holds_the_card_and_nothing_else() -> None:
    """No training text: the card's fields are these, and the header is the card."""
    content = small().to_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert set(header.pop("__metadata__")) == {"foreword"}
    assert set(header) == {f"decoder.{i}.{kind}" for i in range(2) for kind in ("keys", "values")}
    card = json.loads(FULL_CARD.to_json())
    assert set(card) == {"format", "base", "fingerprint", "framing", "init", "training", "metrics", "created"}
    assert set(card["framing"]) == {"template", "chat", "max_input_tokens"}
    assert card["format"] == FORMAT


def changed_card(**changes: Any) -> str:
    """A card's JSON with fields replaced, or left out where the new value is `...`."""
    card = {**json.loads(FULL_CARD.to_json()), **changes}
    return json.dumps({name: value for name, value in card.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"cannot be read \(Expecting value"),
        ("{", "cannot be read"),
        ("[]", "cannot be read .*not a mapping"),
        ("7", "cannot be read .*not a mapping"),
        ("null", "cannot be read"),
        ('"text"', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"a":' * 100_000, "cannot be read"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be read"),
        ("{}", r"cannot be read \('format'\)"),
        (changed_card(base=...), "cannot be read .*base"),
        (changed_card(fingerprint=...), "cannot be read .*fingerprint"),
        (changed_card(framing=...), r"cannot be read \('framing'\)"),
        (changed_card(framing=[]), "cannot be read"),
        (changed_card(framing={"odd": 1}), "cannot be read .*odd"),
        (changed_card(**{"a\nb": 1}), "cannot be read .*'a b'"),
        (changed_card(**{"x" * 9999: 1}), "cannot be read .*xxx"),
        (changed_card(base="\ud800"), "cannot be read .*surrogate"),
        (changed_card(base=None), "wrong kind"),
        (changed_card(fingerprint=7), "wrong kind"),
        (changed_card(init=["x"]), "wrong kind"),
        (changed_card(created=0), "wrong kind"),
        (changed_card(training=[]), "wrong kind"),
        (changed_card(metrics=[["a", 1]]), "wrong kind"),
        (changed_card(metrics={"bleu": "high"}), "wrong kind"),
        (changed_card(metrics={"bleu": True}), "wrong kind"),
        (changed_card(metrics={"bleu": 10**400}), "wrong kind"),
        (changed_card(training={"infix": True}), "wrong kind"),
        (changed_card(framing={"template": 7}), "cannot be read .*a text as template .* got 7"),
        (changed_card(framing={"chat": "yes"}), "cannot be read .*a bool as chat; .* and 'yes'"),
        (changed_card(framing={"max_input_tokens": "many"}), "cannot be read .*max_input_tokens; got 'many'"),
        (changed_card(framing={"max_input_tokens": 0}), "cannot be read .*max_input_tokens of at least 1; got 0"),
        (
            changed_card(format=FORMAT + 1),
            rf"expected format {FORMAT}; the file has format {FORMAT + 1}: upgrade foreword",
        ),
        (changed_card(format="odd\nformat"), f"expected format {FORMAT}; the file has format odd format"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_wrong_card_is_refused(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError, match=match):
        Card.from_json(text)
    path = tmp_path / "p.safetensors"
    save_file(tensors_of(small()), path, {"foreword": text})
    refused(tmp_path, path.read_bytes(), match)


@pytest.mark.parametrize("metrics", [{"loss": None}, {"loss": "3"}, {"loss": True}])
def test_a_card_that_would_be_refused_is_not_saved(metrics: Any, tmp_path: Path) -> None:
    prefix = small()
    wrong = Prefix(prefix.sections, dataclasses.replace(prefix.card, metrics=metrics))
    with pytest.raises(PrefixFileError, match="the card has fields of the wrong kind"):
        wrong.save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_numbers_that_a_dtype_has_not_are_not_saved(tmp_path: Path) -> None:
    prefix = small()
    sections = {
        name: ((keys.float() * 0 + 7e4, values.float()) for keys, values in layers)
        for name, layers in prefix.sections.items()
    }
    large = Prefix(sections, prefix.card)
    with pytest.raises(PrefixFileError, match=r"decoder\.0: expected numbers that torch.float16 has; got larger ones"):
        large.save(tmp_path / "p", torch.float16)
    assert not list(tmp_path.iterdir())
    large.save(tmp_path / "p", torch.float32)
    assert Prefix.load(tmp_path / "p").length == large.length
    assert len(repr(large)) < 1000


def test_a_huge_card_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_file(tensors_of(small()), path, {"foreword": changed_card(init="x" * (1 << 20))})
    refused(tmp_path, path.read_bytes(), "the card is larger than 1048576 bytes")


# ---- the base --------------------------------------------------------------------------------------------


def test_a_prefix_of_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    prefix = small()
    prefix.save(path)
    base: Any = SimpleNamespace(
        name="its/base",
        fingerprint=FULL_CARD.fingerprint,
        shapes={"decoder": [(3, 7), (3, 7)]},
        dtype=torch.float32,
    )
    assert Prefix.load(path, base).shapes == prefix.shapes
    assert prefix.check(base) is prefix
    other: Any = SimpleNamespace(name="other/base", fingerprint="f" * 64, shapes=base.shapes)
    with pytest.raises(
        WrongBaseError,
        match=r"a prefix for the base 'other/base' \(fingerprint ffffffffffff\); this one was trained "
        r"on 'some/base' \(0123456789ab\): load that base, or train a prefix for this one",
    ):
        Prefix.load(path, other)
    odd: Any = SimpleNamespace(name="its/base", fingerprint=FULL_CARD.fingerprint, shapes={"decoder": [(3, 7)]})
    with pytest.raises(
        PrefixFileError,
        match="the prefix's layers do not fit the base that its card names: the file is damaged",
    ):
        prefix.check(odd)


# ---- what no prefix is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({}, "expected the section 'decoder', or all of encoder, decoder, cross; got none"),
        ({"cross": layers(1)}, "got cross"),
        ({"encoder": layers(1), "decoder": layers(1)}, "got decoder, encoder"),
        ({"decoder": layers(1), "odd": layers(1)}, "got decoder, odd"),
        ({"decoder": []}, "expected layers in every section, of one length P; got no layers"),
        ({"encoder": [], "decoder": layers(1), "cross": layers(1)}, "expected layers in every section"),
        ({"decoder": [*layers(1), *layers(1, length=2)]}, "of one length P; got 2, 5"),
        (
            {"decoder": [(torch.ones(3, 5, 7), torch.ones(3, 5, 8))]},
            r"decoder.0: .*\[3, 5, 7\] and \[3, 5, 8\]",
        ),
        ({"decoder": [(torch.ones(5, 7), torch.ones(5, 7))]}, r"decoder.0: .*got \[5, 7\]"),
        ({"decoder": [*layers(1), (torch.ones(3, 0, 7), torch.ones(3, 0, 7))]}, r"decoder.1: .*\[3, 0, 7\]"),
        (
            {"decoder": [(torch.ones(3, 5, 7), torch.full((3, 5, 7), math.nan))]},
            "decoder.0: expected finite numbers",
        ),
        (
            {"decoder": [(torch.full((3, 5, 7), -math.inf), torch.ones(3, 5, 7))]},
            "decoder.0: expected finite numbers",
        ),
        ({"decoder": [(torch.ones(3, 5, 7).long(), torch.ones(3, 5, 7))]}, "floating-point; got torch.int64"),
    ],
)
def test_sections_that_no_base_has_are_refused(sections: dict[str, list[Layer]], match: str) -> None:
    with pytest.raises(PrefixFileError, match=match):
        Prefix(sections, FULL_CARD)


@pytest.mark.parametrize(
    "dtype",
    [
        "BOOL",
        "U8",
        "I8",
        "F8_E5M2",
        "F8_E4M3",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "I16",
        "U16",
        "I32",
        "U32",
        "I64",
        "U64",
        "C64",
        "F4",
        "F6_E2M3",
        "F6_E3M2",
        "F99",
    ],
)
def test_numbers_of_other_kinds_are_refused(dtype: str, tmp_path: Path) -> None:
    bits = {"BOOL": 8, "F4": 4, "C64": 64}.get(dtype) or int("".join(filter(str.isdigit, dtype.split("_")[0])))
    size = 8 * bits // 8
    header = {
        "__metadata__": {"foreword": FULL_CARD.to_json()},
        "decoder.0.keys": {"dtype": dtype, "shape": [1, 2, 4], "data_offsets": [0, size]},
        "decoder.0.values": {"dtype": dtype, "shape": [1, 2, 4], "data_offsets": [size, 2 * size]},
    }
    refused(tmp_path, raw_file(header, b"\0" * 2 * size), "floating-point; got torch|expected a safetensors file")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_numbers_of_these_kinds_are_read(dtype: str, tmp_path: Path) -> None:
    """The same hand-made file, so that the test above fails for its dtype alone."""
    size = 8 * (int(dtype.lstrip("BF")) // 8)
    header = {
        "__metadata__": {"foreword": FULL_CARD.to_json()},
        "decoder.0.keys": {"dtype": dtype, "shape": [1, 2, 4], "data_offsets": [0, size]},
        "decoder.0.values": {"dtype": dtype, "shape": [1, 2, 4], "data_offsets": [size, 2 * size]},
    }
    assert load_bytes(tmp_path, raw_file(header, b"\0" * 2 * size)).shapes == {"decoder": [(1, 4)]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    tensors = tensors_of(small())
    tensors["decoder.1.values"][2, 4, 6] = value
    save_file(tensors, tmp_path / "p.safetensors", {"foreword": FULL_CARD.to_json()})
    refused(
        tmp_path,
        (tmp_path / "p.safetensors").read_bytes(),
        "decoder.1: expected finite numbers; the prefix is damaged",
    )


@pytest.mark.parametrize(
    ("missing", "extra", "match"),
    [
        ("decoder.0.keys", None, "missing or unknown: decoder.0.keys, decoder.1.keys"),
        ("decoder.1.values", None, "missing or unknown: decoder.1.values"),
        ("decoder.1.keys", None, "missing or unknown: decoder.1.values"),
        (None, "decoder.3.keys", "missing or unknown: decoder.2.keys, decoder.2.values, decoder.3.keys"),
        (None, "decoder.00.keys", "missing or unknown"),
        (None, "decoder.-1.keys", "missing or unknown"),
        (None, "odd", "missing or unknown: odd"),
        (None, "two\nlines", "missing or unknown: two lines"),
        (None, "x" * 5000, "missing or unknown: xxxxx"),
        (None, "encoder.0.keys", "missing or unknown: encoder.0.values"),
    ],
)
def test_missing_and_extra_tensors_are_refused(
    missing: str | None, extra: str | None, match: str, tmp_path: Path
) -> None:
    tensors = tensors_of(small())
    tensors.pop(missing or "", None)
    if extra is not None:
        tensors[extra] = torch.ones(3, 5, 7)
    save_file(tensors, tmp_path / "p.safetensors", {"foreword": FULL_CARD.to_json()})
    refused(tmp_path, (tmp_path / "p.safetensors").read_bytes(), match)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"wte.weight": torch.ones(3, 5)}, tmp_path / "model.safetensors", {"format": "pt"})
    no_card = "a safetensors file, but not a prefix: its header has no foreword card"
    refused(tmp_path, (tmp_path / "model.safetensors").read_bytes(), no_card)
    save_file({"wte.weight": torch.ones(3, 5)}, tmp_path / "bare.safetensors")
    refused(tmp_path, (tmp_path / "bare.safetensors").read_bytes(), no_card)
    refused(tmp_path, raw_file({"__metadata__": None}), no_card)
    torch.save({"keys": torch.ones(3)}, tmp_path / "pickle.pt")
    for content in (
        b"",
        b"\0",
        b"plain text, and a good deal of it",
        b"PK\3\4" * 9,
        (tmp_path / "pickle.pt").read_bytes(),
    ):
        refused(tmp_path, content, "expected a safetensors file; it is truncated or something else")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{" * 999,
        struct.pack("<Q", 0),
        raw_file(b"[" * 500_000),
        raw_file(b'{"__metadata__":' * 5000),
        raw_file(b"\xff\xfe\xfd"),
        raw_file({"__metadata__": {"foreword": 7}}),
        raw_file({"__metadata__": {"foreword": None}}),
        raw_file({"decoder.0.keys": {"dtype": "F32", "shape": [2**62, 4, 4], "data_offsets": [0, 64]}}, b"\0" * 64),
        raw_file({"decoder.0.keys": {"dtype": "F32", "shape": [-1, 4, 4], "data_offsets": [0, 64]}}, b"\0" * 64),
        raw_file({"decoder.0.keys": {"dtype": "F32", "shape": [1, 4, 4], "data_offsets": [64, 0]}}, b"\0" * 64),
        raw_file({"decoder.0.keys": {"dtype": "F32", "shape": [1, 4, 4], "data_offsets": [0, 2**60]}}, b"\0" * 64),
        raw_file({"decoder.0.keys": {"dtype": "F32", "shape": [1, 4, 4], "data_offsets": [0, 64]}}, b"\0" * 65),
    ],
    ids=range(14),
)
def test_hostile_headers_are_refused(content: bytes, tmp_path: Path) -> None:
    refused(tmp_path, content, "expected a safetensors file; it is truncated or something else")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = small().to_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    cuts = {*range(10), size, size + 7, size + 8, size + 9, len(content) - 1, *range(10, len(content), 97)}
    assert len(cuts) > 20
    for cut in cuts:
        refused(tmp_path, content[:cut], "expected a safetensors file; it is truncated or something else")
    refused(tmp_path, content + b"\0", "expected a safetensors file; it is truncated or something else")
    assert load_bytes(tmp_path, content).shapes == small().shapes


def test_a_file_with_flipped_bytes_loads_or_is_refused(tmp_path: Path) -> None:
    """Never another exception, nor two lines."""
    chance = random.Random(0)
    content = small().to_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    seen = {"loaded": 0, "refused": 0}
    for n in range(400):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 5))):
            # the header is where it hurts
            end = 8 + size if n % 4 else len(content)
            damaged[chance.randrange(end)] = chance.choice((chance.randrange(256), 0, 10, 34, 92, 125, 57))
        message = ""
        try:
            load_bytes(tmp_path, bytes(damaged)).to_bytes()
        except PrefixFileError as error:
            message = str(error)
        assert "\n" not in message
        seen["refused" if message else "loaded"] += 1
    assert min(seen.values()) > 20, seen


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prefix file at .*nowhere\.safetensors"):
        Prefix.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no prefix file at"):
        Prefix.load(tmp_path / ("x" * 999))
    with pytest.raises(FileNotFoundError, match="no prefix file at"):
        Prefix.load("a\0b")
    with pytest.raises(
        PrefixFileError, match="cannot be read as a prefix file, as it is a folder: name the file in it"
    ):
        Prefix.load(tmp_path)
    with pytest.raises(PrefixFileError, match="cannot be read as a prefix file"):
        Prefix.load("/dev/null")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    small().save(tmp_path / "p.safetensors")
    (tmp_path / "p.safetensors").chmod(0)
    with pytest.raises(PrefixFileError, match=r"cannot be read as a prefix file .*[Pp]ermission"):
        Prefix.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    "name", ["with space", "été 日本.safetensors", "-rf", "%s{0}.x", "a'b\"c", "日" * 83, "x" * 255]
)
def test_odd_file_names(name: str, tmp_path: Path) -> None:
    small().save(tmp_path / name)
    assert Prefix.load(str(tmp_path / name)).card == FULL_CARD
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ---- written whole or not at all -------------------------------------------------------------------------


def write_half(path: Path, error: BaseException) -> None:
    with write_atomically(path) as aside:
        assert aside.parent == path.parent
        aside.write_text("half a n")
        raise error


def test_a_file_that_goes_while_it_is_looked_at_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, look = tmp_path / "file", os.stat
    path.write_text("old")

    def once(given: Any, **more: Any) -> os.stat_result:
        found = look(given, **more)
        if str(given) == str(path):
            path.unlink()
        return found

    monkeypatch.setattr(os, "stat", once)
    check_file(path)
    monkeypatch.undo()
    assert not path.exists()
    with pytest.raises(SettingsError, match="is a folder or a device"):
        check_file(tmp_path)


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a machine that loses its power has neither."""
    path, done = tmp_path / "file", []
    sync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        done.append(("sync", os.fstat(number).st_ino, os.fstat(number).st_size))
        sync(number)

    def replaced(aside: Path, target: Path) -> Path:
        done.append(("rename", aside.stat().st_ino, aside.stat().st_size))
        return replace(aside, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with write_atomically(path) as aside:
        aside.write_text("new")
    inode = path.stat().st_ino
    assert done == [("sync", inode, 3), ("rename", inode, 3)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(type(error)):
        write_half(tmp_path / "none", error)
    assert list(tmp_path.iterdir()) == [path]
    with path.open() as reader:
        with write_atomically(path) as aside:
            aside.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert reader.read() == "old", "whoever has it open reads on"
    assert list(tmp_path.iterdir()) == [path]
    link = tmp_path / "link"
    link.symlink_to("file")
    with write_atomically(link) as aside:
        aside.write_text("newer")
    assert link.is_symlink()
    assert path.read_text() == "newer"
    path.chmod(0o640)
    with write_atomically(path) as aside:
        aside.write_text("secret")
    assert path.stat().st_mode & 0o777 == 0o640, "who may read it stays"


@pytest.mark.parametrize("number", [1.1e6, -3e38])
def test_numbers_that_no_training_makes_are_refused_for_a_base(number: float) -> None:
    base = base_of("llama")
    prefix = random_prefix(base.model, 3)
    layers = [tuple(tensor.clone() for tensor in layer) for layer in prefix.sections["decoder"]]
    card = Card(base=base.name, fingerprint=base.fingerprint)
    layers[1][1][0, 2, 1] = 9.9e5
    assert Prefix({"decoder": layers}, card).check(base)
    layers[1][0][0, 2, 1] = number
    with pytest.raises(PrefixFileError, match=r"decoder.1: expected numbers up to 1,000,000; got .*, which overflows"):
        Prefix({"decoder": layers}, card).check(base)
    layers[1][0][0, 2, 1] = 7e4
    assert Prefix({"decoder": layers}, card).check(base_of("llama", dtype=torch.bfloat16))
    with pytest.raises(PrefixFileError, match=r"decoder.1: expected numbers up to 65,504; got 9.9e\+05"):
        Prefix({"decoder": layers}, card).check(base_of("llama", dtype=torch.float16))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_input_tokens": 0}, "expected max_input_tokens of at least 1; got 0"),
        ({"max_input_tokens": 7.5}, "expected a whole number for max_input_tokens; got 7.5"),
        ({"template": 5}, "expected a text as template"),
        ({"chat": 1}, "expected .* a bool as chat"),
    ],
    ids=str,
)
def test_framings_that_are_none_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Framing(**wrong)


def test_a_framing_takes_numpy_s_numbers() -> None:
    card = Card(base="b", fingerprint="f", framing=Framing(max_input_tokens=cast(Any, np.int64(7))))
    assert Card.from_json(card.to_json()).framing.max_input_tokens == 7


def test_what_killed_writers_left_can_be_removed(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "file") as aside:
        aside.write_text("new")
        left = aside.name
    stay = [f"{left}.safe", f".other{left[5:]}", f".filex{left[5:]}", ".file.0123456789ab.part", "file"]
    for name in (*stay, left, f"{left[:-17]}{'a' * 12}.part"):
        (tmp_path / name).touch()
    remove_asides(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    odd = tmp_path / ("[a]*" * 15)
    odd.touch()
    with write_atomically(odd) as aside:
        aside.write_text("new")
        aside.with_name(aside.name.replace(".part", "")[:-12] + "f" * 12 + ".part").touch()
    assert len(list(tmp_path.iterdir())) == len(stay) + 2
    remove_asides(odd)
    assert len(list(tmp_path.iterdir())) == len(stay) + 1


def test_files_whose_names_begin_alike_are_written_beside_each_other(tmp_path: Path) -> None:
    one, other = (tmp_path / f"{'summarization-of-articles-' * 3}{end}" for end in ("a", "b"))
    with write_atomically(one) as aside:
        aside.write_text("a")
        with write_atomically(other) as beside:
            beside.write_text("b")
        remove_asides(other)
    assert (one.read_text(), other.read_text()) == ("a", "b")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte, as a full disk does."""
    path = tmp_path / "p.safetensors"
    small().save(path)
    before = path.read_bytes()

    def touch_full(aside: Path, **_: object) -> None:
        aside.symlink_to("/dev/full")

    monkeypatch.setattr(Path, "touch", touch_full)
    with pytest.raises(OSError, match="No space left"):
        small().save(path, torch.float32)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder, Path("/dev/null")):
        with pytest.raises(
            SettingsError,
            match=f"expected a file to write to; {path} is a folder or a device: name another path",
        ):
            small().save(path)
    assert Path("/dev/null").is_char_device()
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        small().save(tmp_path / "file" / "p.safetensors")


def test_a_new_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    small().save(tmp_path / "p.safetensors")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "p.safetensors")}
    assert len(modes) == 1


def test_every_refusal_is_a_foreword_error() -> None:
    assert issubclass(WrongBaseError, PrefixFileError)
    assert issubclass(PrefixFileError, ForewordError)
