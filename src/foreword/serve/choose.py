"""Which engine serves a base."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from foreword.errors import MissingExtraError, SettingsError
from foreword.serve.engine import Engine
from foreword.store import Store

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["ENGINES", "choose_engine", "vllm_is_installed"]

ENGINES = ("auto", "local", "vllm")

log = logging.getLogger(__name__)


def vllm_is_installed() -> bool:
    # a folder of that name in the working directory, such as a clone of vLLM, is found too, but not as something to run
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def choose_engine(
    kind: str,
    base: str,
    store: Store,
    *,
    dtype: str = "auto",
    device: str | None = None,
    prefix_bytes: int = 1 << 30,
    cache_bytes: int = 2 << 30,
    max_rows: int = 32,
    ranks: int = 1,
    vllm_options: Mapping[str, Any] | None = None,
) -> tuple[Base, Engine]:
    """Load a base, and make an engine for it that is not yet started.

    Args:
        kind: `local`; `vllm`; or `auto`: vllm where it is installed and can serve the base.
        base, dtype: as `foreword.load_base` takes them.
        device: the same; vLLM has one kind of device, the one that it was built for.
        store: of the prefixes.
        prefix_bytes: memory of the prefixes.
        cache_bytes: see `LocalEngine` and `VllmEngine`.
        max_rows: see `LocalEngine`.
        ranks, vllm_options: see `VllmEngine`.

    Raises:
        SettingsError: there is no such kind, or vLLM cannot serve the base.
        MissingExtraError: vLLM was asked for, and is not installed.
        BaseLoadError: as `foreword.load_base` does.
    """
    from foreword.bases import load_base

    if kind not in ENGINES:
        raise SettingsError(f"expected an engine of {', '.join(ENGINES)}; got {kind!r}")
    there = vllm_is_installed()
    if kind == "vllm" and not there:
        raise MissingExtraError("vllm", "vllm")
    if kind == "vllm" or (kind == "auto" and there):
        from foreword.serve.vllm import VllmEngine, base_for_vllm

        try:
            light = base_for_vllm(base, dtype=dtype, device=device)
            engine = VllmEngine(
                light, store, budget=prefix_bytes, cache_bytes=cache_bytes, ranks=ranks, options=vllm_options
            )
            return light, engine
        except SettingsError as error:
            if kind == "vllm":
                raise
            log.warning("the engine local, since: %s", error)
    if vllm_options or ranks != 1:
        raise SettingsError(
            "vLLM's options and ranks mean nothing to the engine local: leave them away, or take the engine vllm"
        )
    from foreword.serve.local import LocalEngine

    whole = load_base(base, dtype=dtype, device=device)
    local = LocalEngine(whole, store, max_rows=max_rows, prefix_bytes=prefix_bytes, cache_bytes=cache_bytes)
    return whole, local
