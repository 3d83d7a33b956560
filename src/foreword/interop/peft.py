"""PEFT's prefix-tuning checkpoints, read and written without PEFT.

A checkpoint is a folder of `adapter_config.json` and `adapter_model.safetensors`, which holds one tensor,

    prompt_embeddings [P, L * 2 * G * D]

A row is a virtual token: layer 0's keys, its values, layer 1's keys and so on, each [G, D]. Keys are already
rotated, x starts at position P, and the MLP of a prefix trained with `prefix_projection` is folded already.
So these are a decoder-only prefix's own numbers in another order, and both libraries compute the same logits
from them. Where the two differ:

- PEFT keeps neither how x was framed nor which weights the prefix was trained on, only the base's name.
- With sliding windows, PEFT's prefix is out of a token's sight once P and the tokens up to it exceed the
  window. foreword's is visible to every token.
- PEFT's plain forward counts the padding of a left-padded row as positions, unless given `position_ids`.
  foreword never counts padding, nor does PEFT's `generate`.

PEFT's file for an encoder-decoder is no prefix of every layer: its rows are doubled when loaded and split
anew among the decoder's layers, and cross-attention gets nothing. Such files are refused.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from foreword.errors import PrefixFileError, SettingsError, WrongBaseError
from foreword.prefix import Card, Framing, Prefix
from foreword.writing import write_atomically

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["export_peft", "import_peft"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
TENSOR = "prompt_embeddings"

MAX_CONFIG_BYTES = 1 << 16

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose files are written."""


def import_peft(folder: str | os.PathLike[str], base: Base, *, framing: Framing | None = None) -> Prefix:
    """Read a PEFT prefix-tuning checkpoint of a decoder-only base.

    Args:
        folder: what PEFT's `save_pretrained` wrote.
        base: the base it was trained on. PEFT's file cannot prove it: only the shapes are checked.
        framing: how x was framed in training, which PEFT does not keep. Default: `Framing()`.

    Returns:
        the prefix, in float32. Save it with `dtype=torch.float32` to keep every bit.

    Raises:
        FileNotFoundError: there is no such folder.
        PrefixFileError: files are missing or damaged, or are of another PEFT method or of an encoder-decoder;
            or the base is one that PEFT's file cannot describe.
        WrongBaseError: the numbers of layers and of key/value heads, or the heads' size, are not the base's.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no PEFT checkpoint at {folder}")
    try:
        config = _read_config(folder)
        expected = _dimensions(base)
        got = {name: config[name] for name in expected}
        if got != expected:
            raise WrongBaseError(
                f"expected {_listed(expected)} for the base {base.name!r} (token_dim is key/value heads x "
                f"head dimension); the checkpoint has {_listed(got)}: name the base it was trained on"
            )
        stored = _read_tensor(folder, config["num_virtual_tokens"], 2 * got["num_layers"] * got["token_dim"])
        stored = stored.view(len(stored), got["num_layers"], 2, got["num_attention_heads"], -1)
        card = Card(
            base=base.name,
            fingerprint=base.fingerprint,
            framing=framing or Framing(),
            init="imported from PEFT",
            training={
                name: config[name]
                for name in ("peft_version", "base_model_name_or_path", "prefix_projection")
                if isinstance(config.get(name), str | bool)
            },
        )
        layers = stored.permute(1, 2, 3, 0, 4)
        return Prefix({"decoder": [(keys, values) for keys, values in layers]}, card)
    except PrefixFileError as error:
        raise type(error)(f"{folder}: {error}") from None


def export_peft(prefix: Prefix, base: Base, folder: str | os.PathLike[str]) -> None:
    """Write a prefix as a PEFT checkpoint, in float32, for `peft.PeftModel.from_pretrained(model, folder)`.

    The card stays behind, since PEFT has no place for it.

    Args:
        prefix: one of a decoder-only base.
        base: the base it was trained on.
        folder: where to write. It must not exist, or be empty. It is written aside and renamed.

    Raises:
        WrongBaseError: the prefix is of another base.
        PrefixFileError: the base is an encoder-decoder, its layers differ in shape, or the prefix is an infix.
        SettingsError: the folder holds something already, or is a file.
        OSError: it cannot be written there.
    """
    prefix.check(base)
    if prefix.infix:
        raise PrefixFileError("expected a prefix; got an infix, which PEFT has none of")
    dimensions = _dimensions(base)
    # every field that PEFT writes, so that nothing is left to the reader's defaults
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base.model.name_or_path or None,
        "encoder_hidden_size": dimensions["token_dim"],
        "inference_mode": True,
        "init_weights": None,
        "modules_to_save": None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prefix.length,
        "peft_type": "PREFIX_TUNING",
        "peft_version": PEFT_VERSION,
        "prefix_projection": False,
        "revision": None,
        "task_type": "CAUSAL_LM",
        **dimensions,
    }
    tensors = [tensor for layer in prefix.sections["decoder"] for tensor in layer]
    stored = torch.stack([tensor.detach().to("cpu", torch.float32) for tensor in tensors])
    stored = stored.permute(2, 0, 1, 3).reshape(prefix.length, -1).contiguous()

    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SettingsError(f"expected a new or empty folder to export to; {folder} is in use: name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(6)}.part")
    aside.mkdir()
    try:
        with write_atomically(aside / CONFIG) as path:
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        with write_atomically(aside / WEIGHTS) as path:
            path.write_bytes(safetensors_bytes({TENSOR: stored}, metadata={"format": "pt"}))
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _dimensions(base: Base) -> dict[str, int]:
    """The sizes of the base's keys and values, by PEFT's names.

    Raises:
        PrefixFileError: PEFT's file has no room for them.
    """
    if base.is_encoder_decoder:
        raise PrefixFileError(
            f"expected a decoder-only base; {base.name!r} is an encoder-decoder, whose prefix has three "
            "sections, and PEFT's file holds one: keep foreword's own file"
        )
    layers = base.shapes["decoder"]
    if len(set(layers)) != 1:
        shapes = " and ".join(f"{heads}x{dim}" for heads, dim in sorted(set(layers)))
        raise PrefixFileError(
            f"expected a base whose layers all have one shape, as PEFT's file does; {base.name!r} has layers "
            f"of {shapes} (key/value heads x head dimension): keep foreword's own file"
        )
    heads, dim = layers[0]
    return {"num_layers": len(layers), "num_attention_heads": heads, "token_dim": heads * dim}


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size!r:.30}" for name, size in sizes.items())


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a decoder-only prefix-tuning checkpoint, its sizes all positive."""
    try:
        with (folder / CONFIG).open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise PrefixFileError(
            f"expected a folder as PEFT's save_pretrained writes it; its {CONFIG} cannot be read ({error.strerror})"
        ) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise PrefixFileError(f"expected {CONFIG} to be under {MAX_CONFIG_BYTES} bytes: PEFT wrote no such file")
    try:
        config = json.loads(raw.decode())
        # half a surrogate pair can be read, but not written into a card
        json.dumps(config, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise PrefixFileError(f"expected {CONFIG} to be JSON in UTF-8; it is damaged ({error!s:.100})") from None
    if not isinstance(config, dict):
        raise PrefixFileError(f"expected {CONFIG} to be a JSON object; got {config!r:.60}")

    kind, task, parts = (config.get(name) for name in ("peft_type", "task_type", "num_transformer_submodules"))
    if kind != "PREFIX_TUNING":
        raise PrefixFileError(
            f"expected a checkpoint of the PEFT type 'PREFIX_TUNING'; got {kind!r:.60}: only prefix tuning "
            "trains keys and values"
        )
    if task == "SEQ_2_SEQ_LM" or parts == 2:
        raise PrefixFileError(
            "expected a decoder-only checkpoint; this is an encoder-decoder's, which PEFT doubles and splits "
            "anew among the layers, with nothing for cross-attention: train the prefix again with foreword"
        )
    if task != "CAUSAL_LM" or parts != 1:
        raise PrefixFileError(
            "expected task_type 'CAUSAL_LM' and num_transformer_submodules 1 of a decoder-only checkpoint; "
            f"got {task!r:.60} and {parts!r:.60}"
        )
    for name in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"):
        size = config.get(name)
        if type(size) is not int or size < 1:  # isinstance would take True for 1
            raise PrefixFileError(
                f"expected {name} in {CONFIG} to be a positive integer; got {size!r:.60}: save the "
                "checkpoint with PEFT's save_pretrained, which fills it in"
            )
    return config


def _read_tensor(folder: Path, length: int, width: int) -> torch.Tensor:
    """[P, L * 2 * G * D] in float32, a copy of what the file holds."""
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise PrefixFileError(
            f"expected {WEIGHTS}; got {PICKLE}, a pickle, which can run code when loaded: if you trust it, "
            "convert it with PEFT, by PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = sorted(file.keys())
            if names != [TENSOR]:
                raise PrefixFileError(
                    f"expected the one tensor {TENSOR!r} in {WEIGHTS}; got {names!r:.200}: a prefix can hold "
                    "no other weights"
                )
            shape = file.get_slice(TENSOR).get_shape()
            if shape != [length, width]:
                raise PrefixFileError(
                    f"expected {TENSOR!r} of shape {[length, width]!r:.60}, as {CONFIG} says; got "
                    f"{shape!r:.60}: one of the two files is damaged, or another checkpoint's"
                )
            tensor = file.get_tensor(TENSOR)
            if not tensor.is_floating_point():
                raise PrefixFileError(f"expected {TENSOR!r} to be floating-point numbers; got {tensor.dtype}")
            # the file's own tensors are views of it, and change or fault where it is written over
            return tensor.to(torch.float32, copy=True)
    except (SafetensorError, OSError) as error:
        raise PrefixFileError(
            f"expected {WEIGHTS} to be a safetensors file; it is missing, truncated or something else ({error!r:.200})"
        ) from None
