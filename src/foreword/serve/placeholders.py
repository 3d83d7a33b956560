"""What a request says to the KV connector: placeholder tokens, the name of a prefix and its content, and a salt.

vLLM counts P cached tokens before x, so a prompt begins with P token ids that are never computed. They are derived from
the content's hash, as is the salt of its cached blocks: two prefixes, or two versions of one, have different ids, and
whoever names one and sends another's ids is refused. This module needs no vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from foreword.errors import SettingsError
from foreword.store.names import Version, check_name

__all__ = [
    "KEY",
    "cache_salt",
    "completion_fields",
    "kv_transfer_config",
    "kv_transfer_params",
    "parse_kv_transfer_params",
    "placeholder_ids",
]

KEY = "foreword"
"""Under which a request's `kv_transfer_params` name its prefix."""

BUDGET = 1 << 30
"""Bytes of host memory for prefixes, unless another number is given."""


def placeholder_ids(sha256: str, length: int, vocab_size: int) -> list[int]:
    """P token ids below V that stand for a prefix in a prompt.

    Args:
        sha256: of the prefix file, 64 hexadecimal digits.
        length: P.
        vocab_size: V, as the base's configuration says (`config.vocab_size`).
    """
    digest = hashlib.shake_256(f"foreword placeholders {sha256}".encode()).digest(8 * length)
    return [int.from_bytes(digest[i : i + 8], "little") % vocab_size for i in range(0, 8 * length, 8)]


def cache_salt(sha256: str) -> str:
    """The salt of the cached blocks that hold a prefix, and of all that follow it."""
    return f"foreword-{sha256}"


def kv_transfer_params(version: Version) -> dict[str, Any]:
    """A request's `kv_transfer_params`: which prefix stands before it, by name and content."""
    return {KEY: {"name": version.name, "sha256": version.sha256}}


def parse_kv_transfer_params(params: Mapping[str, Any]) -> tuple[str, str]:
    """The name and the sha256 in a request's `kv_transfer_params`.

    Raises:
        SettingsError: they are not as `kv_transfer_params` makes them.
        StoreError: the name cannot be one.
    """
    told = params.get(KEY)
    if not isinstance(told, Mapping) or set(params) != {KEY} or set(told) != {"name", "sha256"}:
        raise SettingsError(
            f'expected kv_transfer_params of the form {{"{KEY}": {{"name": ..., "sha256": ...}}}}; got '
            f"{str(params)[:200]}: make them with foreword.serve.placeholders"
        )
    sha256 = told["sha256"]
    if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise SettingsError(
            f"expected a sha256 of 64 hexadecimal digits in kv_transfer_params; got {str(sha256)[:80]!r}"
        )
    return check_name(told["name"]), sha256


def completion_fields(version: Version, length: int, tokens: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """The fields of a `/v1/completions` body of `vllm serve` that put a prefix before x.

    Args:
        version: of the prefix, from `Store.newest` or `Store.find`.
        length: P, from `Prefix.length`.
        tokens: x, framed: token ids.
        vocab_size: V of the base.
    """
    return {
        "prompt": [*placeholder_ids(version.sha256, length, vocab_size), *tokens],
        "cache_salt": cache_salt(version.sha256),
        "kv_transfer_params": kv_transfer_params(version),
    }


def kv_transfer_config(store: str, fingerprint: str, *, base: str = "", budget: int = BUDGET) -> dict[str, Any]:
    """What `vllm serve` takes as JSON after `--kv-transfer-config`.

    Args:
        store: path or URL of the store.
        fingerprint: of the base that is served, `Base.fingerprint`; a prefix of another base is refused.
        base: its name, for messages.
        budget: bytes of host memory that all prefixes together may take.
    """
    return {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "foreword.serve.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"store": store, "fingerprint": fingerprint, "base": base, "budget": budget},
    }
