"""The engine `local`: each request gets what it gives alone, whatever comes, goes, is put off or fails beside it."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import ENDS, copy_of, prefix_for, reference_base, save, words_base
from tiny import CONTEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foreword.attach import attach
from foreword.bases import Base
from foreword.data import frame
from foreword.errors import (
    MissingExtraError,
    NoSuchPrefixError,
    PrefixFileError,
    SettingsError,
    TooLongError,
    WrongBaseError,
)
from foreword.generation import GenerateSettings, generate
from foreword.prefix import Card, Framing, Prefix
from foreword.serve.choose import choose_engine
from foreword.serve.engine import EngineStoppedError, Piece, Request, Sampling
from foreword.serve.fake import FakeEngine
from foreword.serve.local import LocalEngine, _bytes_a_token
from foreword.serve.runner import Prefill, Row, Runner
from foreword.serve.service import Service, Settings
from foreword.store import Store, Version
from foreword.text import TextSoFar

FAMILIES = ("llama", "gpt2", "bart")


class World:
    """A store with prefixes of a tiny base, and what each request gives alone."""

    def __init__(self, base: Base, folder: Path):
        self.base = base
        self.store = Store(folder / "store", create=True)
        self.prefixes: dict[str, Prefix] = {}
        self.versions: dict[str, Version] = {}
        for name, length in {"five": 5, "two": 2, "long": 31, "Zoë/7": 7}.items():
            self.put(name, prefix_for(self.base, length))

    def put(self, name: str, prefix: Prefix) -> Version:
        self.prefixes[name] = prefix
        self.versions[name] = self.store.put(name, prefix, dtype=torch.float32)
        return self.versions[name]

    def request(self, id: str, text: str, name: str | None, **sampling: Any) -> Request:
        x = frame(self.base, {"input": text}, Framing())
        version = None if name is None else self.versions[name]
        sampling.setdefault("max_tokens", 13)
        return Request(id=id, tokens=tuple(x), prefix=version, sampling=Sampling(**sampling))

    def alone(self, text: str, name: str | None, **settings: Any) -> str:
        settings.setdefault("max_new_tokens", 13)
        prefix = None if name is None else self.prefixes[name]
        return generate(self.base, [text], [prefix], settings=GenerateSettings(**settings))[0]

    @asynccontextmanager
    async def engine(self, **options: Any) -> AsyncIterator[LocalEngine]:
        base = copy_of(self.base)
        engine = LocalEngine(base, self.store, **options)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop(0)
            Runner(base).detach()  # nothing is left attached


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(reference_base(request.param), tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> World:
    return World(reference_base("llama"), tmp_path)


@pytest.fixture(params=FAMILIES)
def words(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """Texts show their tokens, and only the end token ends them."""
    return World(words_base(request.param), tmp_path)


async def pieces_of(engine: LocalEngine, request: Request) -> list[Piece]:
    pieces = [piece async for piece in engine.generate(request)]
    assert all(piece.finish is None for piece in pieces[:-1])
    assert pieces[-1].finish is not None
    return pieces


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def test_a_stop_string_that_half_a_character_makes_at_the_end(llama: World) -> None:
    """What its bytes are is certain when no more come."""

    async def run() -> list[tuple[str, str | None]]:
        async with llama.engine() as engine:
            for seed in range(50):
                how = {"max_tokens": 1, "temperature": 1.0, "seed": seed}
                said = []
                for stop in ((), ("\ufffd",)):
                    pieces = await pieces_of(engine, llama.request(f"{seed}{stop}", "abc", None, stop=stop, **how))
                    said.append((text_of(pieces), pieces[-1].finish))
                if said[0][0] == "\ufffd":
                    break
            return said

    assert asyncio.run(run()) == [("\ufffd", "length"), ("", "stop")]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_rows": 3}, {"cache_bytes": 300, "prefix_bytes": 41}, {"max_rows": 1, "prefix_bytes": 31}],
    ids=str,
)
def test_each_as_if_alone(world: World, options: dict[str, int]) -> None:
    # memory is given in tokens above
    scale = {
        "max_rows": 1,
        "cache_bytes": _bytes_a_token(world.base),
        "prefix_bytes": world.prefixes["two"].num_parameters * 2,
    }
    options = {name: value * scale[name] for name, value in options.items()}
    draw = random.Random(11)
    asked = []
    for i in range(29):
        text = "".join(draw.choice("abc xyz") for _ in range(draw.choice((1, 3, 17, 40))))
        asked.append((f"r{i}", text, draw.choice([*world.versions, None]), draw.choice((1, 5, 23, 40))))

    async def run() -> list[list[Piece]]:
        async with world.engine(**options) as engine:
            assert engine.context == CONTEXT
            wait = random.Random(5)

            async def one(id: str, text: str, name: str | None, limit: int) -> list[Piece]:
                await asyncio.sleep(wait.random() / 5)
                return await pieces_of(engine, world.request(id, text, name, max_tokens=limit))

            answers = await asyncio.gather(*(one(*request) for request in asked))
            figures = engine.figures()
            assert (figures.running, figures.waiting) == (0, 0)
            assert figures.hits + figures.loads == sum(name is not None for _, _, name, _ in asked)
            assert 0 < figures.resident_bytes <= figures.budget_bytes
            assert figures.evictions > 0 or "prefix_bytes" not in options
            return answers

    for (_, text, name, limit), pieces in zip(asked, asyncio.run(run()), strict=True):
        assert text_of(pieces) == world.alone(text, name, max_new_tokens=limit)
        tokens = [token for piece in pieces for token in piece.tokens]
        ended = tokens[-1] in ENDS
        assert pieces[-1].finish == ("stop" if ended else "length")
        assert ended or len(tokens) == limit


def test_rows_are_put_off_and_go_on(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    put_off: list[Row] = []
    leave, prefill = Runner.leave, Runner.prefill

    def leaving(self: Runner, row: Row) -> None:
        left.append(len(row.y))
        if len(row.y) < 60:
            assert row is self.rows[-1], "the youngest makes room"
            put_off.append(row)
        leave(self, row)

    def beginning(self: Runner, rows: Sequence[Row]) -> Prefill:
        for row in rows:
            assert not put_off or row is put_off.pop(), "what was put off is the first to go on, the oldest before"
        return prefill(self, rows)

    monkeypatch.setattr(Runner, "leave", leaving)
    monkeypatch.setattr(Runner, "prefill", beginning)
    monkeypatch.setattr("foreword.serve.local.end_ids", lambda base: set())
    asked = [(f"text {i}" * (1 + i % 3), [None, "five", "two"][i % 3]) for i in range(7)]

    async def run() -> list[str]:
        # memory for one whole context and half of another
        async with llama.engine(cache_bytes=197 * 3 * 2 * 2 * 14 * 4) as engine:
            assert engine.context == CONTEXT
            requests = (llama.request(str(i), text, name, max_tokens=60) for i, (text, name) in enumerate(asked))
            return [text_of(pieces) for pieces in await asyncio.gather(*(pieces_of(engine, one) for one in requests))]

    answers = asyncio.run(run())
    monkeypatch.setattr("foreword.generation.end_ids", lambda base: set())
    assert answers == [llama.alone(text, name, max_new_tokens=60) for text, name in asked]
    assert len(left) > 7, "some have left more than once"
    assert sum(length == 60 for length in left) == 7


def test_long_inputs_keep_nobody_waiting_for_long(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through the base a few columns at a time, with a step of the others after each."""
    turns: list[tuple[str, int, int]] = []
    advance, step = Runner.advance, Runner.step

    def chunk(self: Runner, prefill: Any, columns: int) -> torch.Tensor | None:
        turns.append(("chunk", len(prefill.rows), min(columns, prefill.columns)))
        return advance(self, prefill, columns)

    def count(self: Runner) -> torch.Tensor:
        turns.append(("step", len(self.rows), 1))
        return step(self)

    monkeypatch.setattr("foreword.serve.local.PREFILL_TOKENS", 17)
    monkeypatch.setattr("foreword.serve.local.end_ids", lambda base: set())

    async def run() -> list[str]:
        async with llama.engine() as engine:
            first = asyncio.create_task(pieces_of(engine, llama.request("first", "a", None, max_tokens=90)))
            await settled(lambda: len(engine._runner.rows) == 1)
            monkeypatch.setattr(Runner, "advance", chunk)
            monkeypatch.setattr(Runner, "step", count)
            later = [llama.request(str(i), "x" * (60 + i), None, max_tokens=3) for i in range(4)]
            with engine._changed:  # so that they come at once
                asked = [asyncio.create_task(pieces_of(engine, one)) for one in later]
                await settled(lambda: len(engine._arrived) == 4)
            texts = [text_of(pieces) for pieces in await asyncio.gather(*asked)]
            assert not first.done()
            await first
            return texts

    texts = asyncio.run(run())
    monkeypatch.setattr("foreword.generation.end_ids", lambda base: set())
    assert texts == [llama.alone("x" * (60 + i), None, max_new_tokens=3) for i in range(4)]
    chunks = [i for i, (kind, _, _) in enumerate(turns) if kind == "chunk"]
    assert max(turns[i][1] for i in chunks) > 1, "some begin together"
    for i in chunks:
        _, rows, columns = turns[i]
        assert rows * columns <= 17
        assert turns[i + 1][0] == "step"


def test_a_context_that_memory_shortens_is_told_of(llama: World, caplog: pytest.LogCaptureFixture) -> None:
    async def run(**options: Any) -> list[str]:
        caplog.clear()
        async with llama.engine(**options):
            return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert asyncio.run(run()) == []
    (said,) = asyncio.run(run(cache_bytes=50 * _bytes_a_token(llama.base)))
    assert said == f"texts may have 50 tokens of the base's {CONTEXT}, for which --cache-memory has no room"


def test_sampling_stop_and_logprobs(words: World) -> None:
    world = words
    text = next(text for text in (f"w{i} w{i + 3}" for i in range(99)) if len(world.alone(text, "five").split()) > 8)
    said = world.alone(text, "five").split()
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_p": 0.8, "seed": 4},
        {"temperature": 1.0, "seed": 3},
        {"stop": ("never", f"{said[4][1:]} {said[5]}")},
        {},
    ]
    asked = [(text, name, kind) for name in ("five", None) for kind in kinds]

    async def run() -> list[list[Piece]]:
        async with world.engine() as engine:
            return await asyncio.gather(
                *(
                    pieces_of(engine, world.request(str(i), text, name, max_tokens=40, logprobs=i % 3, **kind))
                    for i, (text, name, kind) in enumerate(asked)
                )
            )

    answers = asyncio.run(run())
    for i, ((text, name, kind), pieces) in enumerate(zip(asked, answers, strict=True)):
        assert text_of(pieces) == world.alone(text, name, max_new_tokens=40, **kind)
        tokens = [token for piece in pieces for token in piece.tokens]
        told = [one for piece in pieces for one in piece.logprobs]
        assert [one.token for one in told] == tokens
        for one, logprobs in zip(told, logprobs_of(world, text, name, tokens), strict=True):
            assert one.logprob == pytest.approx(float(logprobs[one.token]), abs=1e-4)
            values, _ = logprobs.topk(i % 3)
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert len({token for token, _ in one.top}) == i % 3
            for token, value in one.top:
                assert value == pytest.approx(float(logprobs[token]), abs=1e-4)
    assert text_of(answers[0]) == text_of(answers[2])
    assert len({text_of(pieces) for pieces in answers}) >= 7


@torch.no_grad()
def logprobs_of(world: World, text: str, name: str | None, tokens: Sequence[int]) -> list[torch.Tensor]:
    """At each place of y the log-probabilities, all computed in one pass."""
    x = frame(world.base, {"input": text}, Framing())
    model = world.base.model
    if world.base.is_encoder_decoder:
        given = [model.config.decoder_start_token_id, *tokens[:-1]]
        inputs = {"input_ids": torch.tensor([x]), "decoder_input_ids": torch.tensor([given])}
    else:
        inputs = {"input_ids": torch.tensor([[*x, *tokens[:-1]]])}
    if name is None:
        logits = model(**inputs).logits
    else:
        with attach(model, world.prefixes[name]):
            logits = model(**inputs).logits
    return list(logits[0, -len(tokens) :].log_softmax(-1))


def test_any_seed_where_none_is_given(llama: World) -> None:
    async def run() -> list[str]:
        async with llama.engine() as engine:
            requests = (llama.request(str(i), "text", "five", temperature=1.0, max_tokens=20) for i in range(4))
            return [text_of(pieces) for pieces in await asyncio.gather(*(pieces_of(engine, one) for one in requests))]

    assert len(set(asyncio.run(run()))) > 1


def test_who_leaves_frees_the_row(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.serve.local.end_ids", lambda base: set())

    async def run() -> None:
        async with llama.engine(max_rows=2) as engine:
            talkers = [engine.generate(llama.request(f"t{i}", "a", "five", max_tokens=120)) for i in range(2)]
            for talker in talkers:
                await anext(talker)
            waiting = asyncio.create_task(pieces_of(engine, llama.request("w", "bc", "two")))
            cancelled = asyncio.create_task(pieces_of(engine, llama.request("c", "bc", "long")))
            await settled(lambda: engine.figures().waiting == 2)
            cancelled.cancel()
            await settled(lambda: engine.figures().waiting == 1)
            await talkers[0].aclose()
            async with asyncio.timeout(20):
                await waiting
            await talkers[1].aclose()
            await settled(lambda: engine.figures().running == 0)
            await engine.forget([version.sha256 for version in llama.versions.values()])
            await settled(lambda: engine.figures().resident_bytes == 0)

    asyncio.run(run())


def test_pinned_to_its_content(llama: World) -> None:
    async def run() -> None:
        async with llama.engine() as engine:
            old, before = llama.prefixes["five"], llama.versions["five"]
            expected = llama.alone("text", "five")
            new = llama.put("five", prefix_for(llama.base, 6))
            request = Request(id="o", tokens=llama.request("", "text", None).tokens, prefix=before, sampling=Sampling(max_tokens=13))  # fmt: skip
            both = await asyncio.gather(
                pieces_of(engine, request), pieces_of(engine, llama.request("n", "text", "five"))
            )
            assert [text_of(pieces) for pieces in both] == [expected, llama.alone("text", "five")]
            assert llama.alone("text", "five") != expected
            assert old.length != llama.prefixes["five"].length
            # deleted, but in memory; then not in memory either
            llama.store.delete("five")
            assert text_of(await pieces_of(engine, llama.request("m", "text", "five"))) == llama.alone("text", "five")
            await engine.forget([new.sha256])
            with pytest.raises(NoSuchPrefixError, match="is not in the store any more"):
                await pieces_of(engine, llama.request("g", "text", "five"))

    asyncio.run(run())


def test_errors_are_one_request_s(llama: World, tmp_path: Path) -> None:
    other = Prefix(prefix_for(llama.base, 3).sections, Card(base="other", fingerprint="f" * 64))
    llama.put("other", other)
    llama.put("huge", prefix_for(llama.base, 113))
    damaged = llama.put("damaged", prefix_for(llama.base, 4, seed=9))
    (file,) = (tmp_path / "store").rglob(f"*{damaged.sha256}.safetensors")
    file.write_bytes(b"no prefix")
    long = "x" * (CONTEXT - 1 - 5)

    async def run() -> None:
        async with llama.engine(prefix_bytes=70_000) as engine:
            good = asyncio.create_task(pieces_of(engine, llama.request("good", "text", "five", max_tokens=40)))
            for name, text, error, message in [
                ("other", "t", WrongBaseError, "expected a prefix for the base 'tiny-llama'"),
                ("damaged", "t", PrefixFileError, "is damaged, its hash is another"),
                ("huge", "t", SettingsError, "expected prefixes of at most 70,000 bytes"),
                (
                    "five",
                    long,
                    TooLongError,
                    f"expected at most {CONTEXT} positions.*got 127 tokens of input, 5 virtual",
                ),
                (None, long + 9 * "x", TooLongError, f"expected at most {CONTEXT} positions.*got 136 tokens"),
            ]:
                with pytest.raises(error, match=message):
                    await pieces_of(engine, llama.request(f"{name}", text, name))
            assert text_of(await good) == llama.alone("text", "five", max_new_tokens=40)
            # the context ends the text
            pieces = await pieces_of(engine, llama.request("last", long[:-3], "five", max_tokens=40))
            assert text_of(pieces) == llama.alone(long[:-3], "five", max_new_tokens=40)
            assert sum(len(piece.tokens) for piece in pieces) <= 3

    asyncio.run(run())
    with pytest.raises(SettingsError, match="expected max_rows"):
        LocalEngine(llama.base, llama.store, max_rows=0)
    with pytest.raises(SettingsError, match="expected cache_bytes of more than"):
        LocalEngine(llama.base, llama.store, cache_bytes=700)
    assert LocalEngine(llama.base, llama.store, cache_bytes=50 * 3 * 2 * 2 * 14 * 4).context == 50


@pytest.mark.parametrize("number", [1e38, -3e38])
@pytest.mark.parametrize("kind", [0, 1], ids=["keys", "values"])
def test_numbers_that_overflow_stay_with_their_row(
    llama: World, kind: int, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beside it, who come when it has gone, and the bare base; were such a prefix let in at all."""
    monkeypatch.setattr("foreword.prefix.LARGEST", math.inf)
    layers = [tuple(tensor.clone() for tensor in layer) for layer in prefix_for(llama.base, 6).sections["decoder"]]
    for layer in layers:
        layer[kind].fill_(number)
    llama.put("bad", Prefix({"decoder": layers}, llama.prefixes["five"].card))  # type: ignore[dict-item]

    async def run() -> None:
        async with llama.engine(max_rows=4) as engine:
            for _ in range(3):
                good = [
                    asyncio.create_task(pieces_of(engine, llama.request(f"{name}", "text", name, max_tokens=20)))
                    for name in (None, "two", "five")
                ]
                # keys of one sign are but a softmax of one place
                fails = (kind, number) != (0, 1e38)
                with pytest.raises(PrefixFileError, match="logits are no finite") if fails else nullcontext():
                    await pieces_of(engine, llama.request("bad", "text", "bad", max_tokens=9))
                for name, one in zip((None, "two", "five"), good, strict=True):
                    assert text_of(await one) == llama.alone("text", name, max_new_tokens=20)

    asyncio.run(run())


def test_what_is_in_memory_waits_for_nobodys_loading(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read, go_on = llama.store.read, threading.Event()

    def slowly(version: Version) -> bytes:
        if version.name.startswith("cold"):
            assert go_on.wait(60)
        return read(version)

    for n in range(9):
        llama.put(f"cold {n}", prefix_for(llama.base, 3, seed=n))

    async def run() -> None:
        async with llama.engine() as engine:
            await pieces_of(engine, llama.request("warm", "text", "five"))
            monkeypatch.setattr(llama.store, "read", slowly)
            cold = [
                asyncio.create_task(pieces_of(engine, llama.request(f"c{n}", "text", f"cold {n}"))) for n in range(9)
            ]
            await asyncio.sleep(0.1)
            again = await asyncio.wait_for(pieces_of(engine, llama.request("again", "text", "five")), 20)
            assert text_of(again) == llama.alone("text", "five")
            go_on.set()
            for n, one in enumerate(cold):
                assert text_of(await one) == llama.alone("text", f"cold {n}")

    asyncio.run(run())


def test_a_failed_step_is_survived(
    llama: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = Runner.step
    failures = [1]

    def fail_once(self: Runner) -> torch.Tensor:
        if len(self.rows) == 2 and failures:
            failures.pop()
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(Runner, "step", fail_once)

    async def run() -> None:
        async with llama.engine() as engine:
            requests = [llama.request(f"r{i}", "text", name, max_tokens=30) for i, name in enumerate(("five", None))]
            # the prefix is there, and they come at once: they are two rows of one batch
            await pieces_of(engine, llama.request("before", "text", "five"))
            with engine._changed:
                asked = [asyncio.create_task(pieces_of(engine, one)) for one in requests]
                await settled(lambda: len(engine._arrived) == 2)
            failed = await asyncio.gather(*asked, return_exceptions=True)
            assert [str(one) for one in failed] == ["out of memory"] * 2
            assert text_of(await pieces_of(engine, llama.request("again", "text", "five"))) == llama.alone(
                "text", "five"
            )
            assert engine.problem() is None
            await engine.forget([llama.versions["five"].sha256])
            assert engine.figures().resident_bytes == 0

    asyncio.run(run())
    assert "a step of the engine failed" in caplog.text


def test_stopping(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.serve.local.end_ids", lambda base: set())

    async def run() -> None:
        async with llama.engine(max_rows=1) as engine:
            under_way = [
                asyncio.create_task(pieces_of(engine, llama.request(str(i), "text", "five"))) for i in range(3)
            ]
            await settled(lambda: engine.figures().running == 1)
            stopping = asyncio.create_task(engine.stop(30))
            await asyncio.sleep(0)
            with pytest.raises(EngineStoppedError, match="takes no requests"):
                await pieces_of(engine, llama.request("late", "text", None))
            answers = await asyncio.gather(*under_way)
            await stopping
            assert len({text_of(pieces) for pieces in answers}) == 1
        async with llama.engine(max_rows=1) as engine:
            under_way = [
                asyncio.create_task(pieces_of(engine, llama.request(str(i), "text", "five", max_tokens=90)))
                for i in range(3)
            ]
            await settled(lambda: engine.figures().running == 1)
            await engine.stop(0.01)
            cut = await asyncio.gather(*under_way, return_exceptions=True)
            assert isinstance(cut[-1], EngineStoppedError)
            await engine.stop(0)

    asyncio.run(run())


@pytest.mark.parametrize("stop", [(), ("é",), ("ab", "bc"), ("never",), ("\n\n", "z")], ids=str)
def test_text_as_it_comes(stop: tuple[str, ...]) -> None:
    base = reference_base("llama")
    draw = random.Random(str(stop))
    for _ in range(100):
        text = "".join(draw.choice(["a", "b", "c", "é", "漢", "\n", " ", "🙂"]) for _ in range(draw.randrange(12)))
        tokens = list(text.encode())
        if draw.random() < 0.3:
            tokens = tokens[: draw.randrange(len(tokens) + 1)]  # perhaps within a character
        so_far = TextSoFar(base.decode, stop)
        pieces: list[str] = []
        for token in (vocabulary(base)[byte] for byte in tokens):
            pieces.append(so_far.add(token))
            if so_far.stopped:
                break
            whole = "".join(pieces)
            assert "\ufffd" not in whole
            assert not any(string in whole for string in stop)
        pieces.append(so_far.end())
        full = base.decode([vocabulary(base)[byte] for byte in tokens])
        cut = min((place for place in map(full.find, stop) if place >= 0), default=len(full))
        assert "".join(pieces) == full[:cut]
        assert so_far.stopped == (cut < len(full))


def test_bytes_that_are_no_text_are_read_a_few_times_each() -> None:
    """And not all of them again with each new one, in the thread that all rows share."""
    base = reference_base("llama")
    draw = random.Random(0)
    for whole in range(30):
        # lone bytes of all kinds, and now and then a character
        some = [
            draw.choice([b"\xf0", b"\x9f", b"\x99", b"\xe6", b"\xc3", "🙂".encode(), b"a"][: 5 if whole % 2 else 7])
            for _ in range(97)
        ]
        tokens = [vocabulary(base)[byte] for byte in b"".join(some)]
        asked: list[int] = []

        def decode(ids: Sequence[int], asked: list[int] = asked) -> str:
            asked.append(len(ids))
            return base.decode(ids)

        so_far = TextSoFar(decode)
        pieces = [so_far.add(token) for token in tokens]
        assert max(asked) < 20
        assert sum(map(bool, pieces)) > 10
        assert "".join([*pieces, so_far.end()]) == base.decode(tokens)


def test_text_as_it_comes_with_spaces_of_the_words(llama: World) -> None:
    """A tokenizer of which the first token's space is no text, but a space by itself is."""
    words = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁bc", "!", "▁!"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    base = Base(
        llama.base.model,
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        "spaces",
    )
    draw = random.Random(0)
    for _ in range(100):
        tokens = draw.choices(range(1, 8), k=draw.randrange(7))
        so_far = TextSoFar(base.decode)
        pieces = [so_far.add(token) for token in tokens]
        assert "".join([*pieces, so_far.end()]) == base.decode(tokens), tokens
    service = Service(base, llama.store, FakeEngine(), None, None, Settings())
    assert [service.word(i) for i in range(1, 8)] == ["</s>", "<unk>", " ", " a", " bc", "!", " !"]


def vocabulary(base: Base) -> dict[int, int]:
    """The token of each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {byte: base.tokenizer.convert_tokens_to_ids(symbol) for byte, symbol in bytes_to_unicode().items()}  # type: ignore[misc]


def test_without_vllm(llama: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name, such as a clone that lies there, is not vLLM."""
    folder = save(llama.base, tmp_path / "base")
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("vllm") is not None
    base, engine = choose_engine("auto", folder, llama.store)
    assert (engine.name, base.fingerprint) == ("local", llama.base.fingerprint)
    with pytest.raises(MissingExtraError, match="this needs the package 'vllm', which is not installed: pip install"):
        choose_engine("vllm", folder, llama.store)
