"""The whole server with the engine local: many requests over many prefixes that change meanwhile; two tenants; fuzzing."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck
from serving import copy_of, prefix_for, reference_base, served, words_base
from soak import Soak

from foreword.generation import GenerateSettings, generate
from foreword.prefix import Framing
from foreword.serve import FakeEngine, LocalEngine, create_app
from foreword.serve.local import _bytes_a_token
from foreword.serve.slots import Slots
from foreword.store import Store

REQUESTS = int(os.environ.get("FOREWORD_SOAK", "200"))
"""Set it to 2000 for the long one."""


def test_soak(tmp_path: Path) -> None:
    reference = words_base("llama")
    base = copy_of(reference)
    store = Store(tmp_path / "store", create=True)
    # memory for a fifth of the prefixes, and for a few rows, so that both run out
    longest = prefix_for(reference, 11).num_parameters * 4
    engine = LocalEngine(base, store, max_rows=9, prefix_bytes=6 * longest, cache_bytes=250 * _bytes_a_token(base))
    app = create_app(base, store, engine=engine)
    with served(app) as url:
        soak = Soak(reference, url, "tiny-llama", requests=REQUESTS, seconds=REQUESTS / 40)
        asyncio.run(soak.run())
        figures = engine.figures()
        assert (figures.running, figures.waiting) == (0, 0)
        assert figures.evictions > 0
        assert figures.resident_bytes <= figures.budget_bytes
    counts = soak.check()
    print(counts)
    assert counts["same"] + counts["tied"] + counts["no such prefix"] == REQUESTS
    assert counts["same"] > 0.6 * REQUESTS
    assert counts["bare"] > 0
    assert counts["changes"] > REQUESTS / 20
    assert list(store.verify()) == []


def test_a_soak_finds_out_an_engine_that_mixes_up_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = words_base("llama")
    base = copy_of(reference)
    store = Store(tmp_path / "store", create=True)
    slot = Slots.slot
    monkeypatch.setattr(Slots, "slot", lambda self, key: min(slot(self, key), 0))
    with served(create_app(base, store, engine=LocalEngine(base, store))) as url:
        soak = Soak(reference, url, "tiny-llama", requests=20, seconds=0.2, prefixes=7)
        asyncio.run(soak.run())
    with pytest.raises(AssertionError, match="apart at|goes on after"):
        soak.check()


def test_two_tenants_ask_the_same(tmp_path: Path) -> None:
    reference = words_base("llama")
    base = copy_of(reference)
    store = Store(tmp_path / "store", create=True)
    prefixes = {"one": prefix_for(reference, 7, seed=1), "two": prefix_for(reference, 7, seed=2)}
    for name, prefix in prefixes.items():
        store.put(name, prefix.to_bytes(reference.dtype))
    prompt = " ".join(f"w{i}" for i in range(40))
    expected = {
        name: generate(
            reference, [prompt], [prefixes.get(name)], framing=Framing(), settings=GenerateSettings(max_new_tokens=9)
        )[0]
        for name in (*prefixes, "tiny-llama")
    }
    assert len(set(expected.values())) == 3
    app = create_app(base, store, engine=LocalEngine(base, store))

    async def run(url: str) -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def ask(i: int) -> tuple[str, str]:
                name = ("one", "two", "tiny-llama")[i % 3]
                await asyncio.sleep(random.Random(i).random() / 5)
                answer = await client.completions.create(model=name, prompt=prompt, max_tokens=9, temperature=0)
                return name, answer.choices[0].text

            return list(await asyncio.gather(*(ask(i) for i in range(24))))

    with served(app) as url:
        answers = asyncio.run(run(url))
    for name, text in answers:
        assert text == expected[name]


def test_no_request_whatever_makes_the_server_fail(tmp_path: Path) -> None:
    base = reference_base("llama")
    store = Store(tmp_path / "store", create=True)
    names = ["plain", "chat", "tiny-llama"]
    store.put("plain", prefix_for(base, 5))
    store.put("chat", prefix_for(base, 4, chat=True))
    app = create_app(base, store, engine=FakeEngine())
    seen: dict[int, int] = {}
    with served(app) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 11

        for operation in operations:

            @hypothesis.given(case=operation.as_strategy())
            @hypothesis.settings(
                max_examples=12,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            def fuzz(case: Any) -> None:
                if isinstance(case.body, dict) and len(str(case.body)) % 2:
                    # so that it gets further than to "no such model"
                    case.body["model"] = names[len(str(case.body)) % 3]
                response = case.call()
                seen[response.status_code] = seen.get(response.status_code, 0) + 1
                assert response.status_code < 500, (case, response.text)
                case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])

            fuzz()
        assert httpx.get(f"{url}/health").status_code == 200
    assert seen.get(200, 0) > 20
    assert seen.get(400, 0) + seen.get(404, 0) > 20
