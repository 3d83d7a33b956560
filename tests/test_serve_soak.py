"""The whole server with either engine: many requests over many prefixes that are uploaded, replaced and deleted meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from serving import ENGINES, copy_of, prefix_for, served, words_base
from soak import Soak
from tiny import CONTEXT
from vllm_harness import OPTIONS, SIZES, served_base

from foreword.bases import Base
from foreword.serve import Engine, LocalEngine, Piece, Request, create_app
from foreword.serve.local import _bytes_a_token
from foreword.serve.vllm import VllmEngine
from foreword.store import Store, Version

REQUESTS = int(os.environ.get("FOREWORD_SOAK", "200"))
"""Of the slow one; set it to 2000 for a long one."""


@dataclass
class World:
    """A running server, and a base of its own for references."""

    reference: Base
    store: Store
    engine: Engine
    url: str


@pytest.fixture(scope="module", params=ENGINES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("soak")
    store = Store(folder / "store", create=True)
    engine: Engine
    # memory for a fifth of the prefixes, and for a few rows, so that both run out
    if request.param == "vllm":
        reference = words_base("llama", **SIZES["llama"] | {"max_position_embeddings": CONTEXT})
        budget = 6 * 4 * prefix_for(reference, 11).num_parameters
        base = served_base(reference, folder)
        # blocks of 32 tokens, of which a row takes one to three
        options = OPTIONS | {"num_gpu_blocks_override": 6, "max_num_seqs": 16}
        engine = VllmEngine(base, store, budget=budget, options=options)
    else:
        reference = words_base("llama")
        budget = 6 * 4 * prefix_for(reference, 11).num_parameters
        base = copy_of(reference)
        cache_bytes = 250 * _bytes_a_token(base)
        engine = LocalEngine(base, store, max_rows=9, prefix_bytes=budget, cache_bytes=cache_bytes)
    with served(create_app(base, store, engine=engine)) as url:
        yield World(reference, store, engine, url)


@pytest.mark.parametrize("requests", [60, pytest.param(REQUESTS, marks=pytest.mark.slow)])
def test_soak(world: World, requests: int) -> None:
    engine = world.engine
    soak = Soak(world.reference, world.url, "tiny-llama", requests=requests, seconds=requests / 60)
    asyncio.run(soak.run())
    figures = engine.figures()
    assert (figures.running, figures.waiting) == (0, 0)
    assert figures.evictions > 0
    assert figures.resident_bytes <= figures.budget_bytes
    if engine.name == "vllm" and requests >= 200:
        assert figures.more["preemptions"] > 0
    counts = soak.check()
    print(counts, figures)
    assert counts["same"] + counts["tied"] + counts["no such prefix"] == requests
    assert counts["same"] > 0.6 * requests
    assert counts["bare"] > 0
    assert counts["changes"] > requests / 50
    assert list(world.store.verify()) == []


@pytest.mark.parametrize("what", ["prefixes", "versions"])
def test_a_soak_finds_out_an_engine_that_mixes_up(world: World, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    generate: Callable[[Request], AsyncGenerator[Piece, None]] = world.engine.generate
    first: dict[str, Version] = {}

    def mixed_up(request: Request) -> AsyncGenerator[Piece, None]:
        """With the first prefix that came, or with the first version of this one."""
        if request.prefix is not None:
            version = first.setdefault(request.prefix.name if what == "versions" else "", request.prefix)
            request = replace(request, prefix=version)
        return generate(request)

    monkeypatch.setattr(world.engine, "generate", mixed_up)
    soak = Soak(world.reference, world.url, "tiny-llama", requests=40, seconds=1.0, prefixes=3)
    asyncio.run(soak.run())
    with pytest.raises(AssertionError, match="apart at|goes on after|though there was one"):
        soak.check()
