"""The server as OpenAI's own client sees it, over a socket: the engine local beneath, each answer what it is alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from serving import ENDS, ENGINES, chat_base, copy_of, make_base, prefix_for, served, until
from tiny import CONTEXT
from vllm_harness import BLOCK, OPTIONS, SIZES, served_base

from foreword.bases import Base
from foreword.data import frame
from foreword.generation import GenerateSettings, generate
from foreword.prefix import Card, Framing, Prefix
from foreword.serve.engine import Engine
from foreword.serve.http import create_app
from foreword.serve.local import LocalEngine
from foreword.serve.service import Settings
from foreword.serve.vllm import VllmEngine
from foreword.store import Store

BASE = "tiny-llama"
NAMES = ("plain", "Zoë / 7", "told", "chatty")
LIMIT = 11


class World:
    """A running server, and what its answers have to be."""

    def __init__(self, folder: Path, engine: str):
        # of one size, so that both engines are asked the same
        self.base = chat_base(**SIZES["llama"] | {"max_position_embeddings": CONTEXT})
        with torch.no_grad():
            # or hardly any text were longer than a few tokens, and readable
            self.base.model.lm_head.weight[[t for t in range(256) if not self.base.decode([t]).isascii()]] *= 0.6
            self.base.model.lm_head.weight[ENDS] *= 0.7
        self.prefixes = {
            "plain": prefix_for(self.base, 5),
            "Zoë / 7": prefix_for(self.base, 3, template="Say {input}="),
            "told": prefix_for(self.base, 4, template="{name}: {input} ({price})"),
            "chatty": prefix_for(self.base, 6, chat=True),
        }
        self.folder = folder / "store"
        self.store = Store(self.folder, create=True)
        for name, prefix in self.prefixes.items():
            self.store.put(name, prefix, dtype=torch.float32)
        self.engine: Engine
        if engine == "vllm":
            base = served_base(self.base, folder)
            options = OPTIONS | {"num_gpu_blocks_override": 64, "max_num_seqs": 16}
            self.engine = VllmEngine(base, self.store, options=options)
        else:
            base = copy_of(self.base)
            self.engine = LocalEngine(base, self.store, max_rows=5)
        self.app = create_app(base, self.store, engine=self.engine)
        self.url = ""

    def put(self, name: str, prefix: Prefix) -> Path:
        """Store a prefix, for one test. Returns its file."""
        self.prefixes[name] = prefix
        sha256 = self.store.put(name, prefix, dtype=torch.float32).sha256
        (file,) = self.folder.rglob(f"*{sha256}.safetensors")
        return file

    def delete(self, *names: str) -> None:
        for name in names:
            self.store.delete(name)
            self.prefixes.pop(name)

    def idle(self) -> bool:
        figures = self.engine.figures()
        return self.app.state.service.limits.under_way == figures.running == figures.waiting == 0

    def alone(self, x: Any, name: str, *, framing: Framing | None = None, **settings: Any) -> str:
        prefix = self.prefixes.get(name)
        framing = framing or (Framing(template="{input}") if prefix is None else None)
        settings.setdefault("max_new_tokens", LIMIT)
        return generate(self.base, [x], [prefix], settings=GenerateSettings(**settings), framing=framing)[0]

    def tokens(self, text: str, framing: Framing) -> int:
        return len(frame(self.base, {"input": text}, framing))


@pytest.fixture(scope="module", params=ENGINES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("openai"), request.param)
    with served(world.app) as url:
        world.url = url
        yield world


@pytest.fixture
def client(world: World) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def asynchronous(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [BASE, *sorted(NAMES)]
    assert {model.object for model in models} == {"model"}
    for name in (BASE, *NAMES):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", [BASE, "plain", "Zoë / 7"])
def test_completions(world: World, client: openai.OpenAI, name: str) -> None:
    prompt = "some text"
    answer = client.completions.create(model=name, prompt=prompt, max_tokens=LIMIT, temperature=0)
    (choice,) = answer.choices
    expected = world.alone(prompt, name)
    assert choice.text == expected
    assert expected
    assert answer.model == name
    assert answer.object == "text_completion"
    assert choice.finish_reason in ("stop", "length")
    assert choice.logprobs is None
    assert answer.usage is not None
    framing = Framing(template="{input}") if name == BASE else world.prefixes[name].card.framing
    # virtual tokens are not counted
    assert answer.usage.prompt_tokens == world.tokens(prompt, framing)
    assert 0 < answer.usage.completion_tokens <= LIMIT
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    stream = client.completions.create(
        model=name,
        prompt=prompt,
        max_tokens=LIMIT,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_and_n(world: World, client: openai.OpenAI) -> None:
    prompts = ["a", "some longer text", "bc"]
    how: dict[str, Any] = {
        "model": "plain",
        "prompt": prompts,
        "n": 2,
        "temperature": 1.0,
        "seed": 7,
        "max_tokens": LIMIT,
    }
    answer = client.completions.create(**how)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for i, choice in enumerate(answer.choices):
        one = {"prompt": prompts[i // 2], "seed": 7 + i, "n": 1}
        if world.engine.name == "local":
            assert choice.text == world.alone(one["prompt"], "plain", temperature=1.0, seed=one["seed"])
        else:
            # vLLM draws otherwise than we do, but always the same
            assert choice.text == client.completions.create(**how | one).choices[0].text
    assert len({choice.text for choice in answer.choices}) > 4
    texts = [""] * 6
    for chunk in client.completions.create(**how, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(world.tokens(prompt, Framing()) for prompt in prompts)
    plain = client.completions.create(**{**how, "seed": None})
    again = client.completions.create(**{**how, "seed": None})
    assert [choice.text for choice in plain.choices] != [choice.text for choice in again.choices]


def test_framing(world: World, client: openai.OpenAI) -> None:
    def ask(prompt: Any, name: str, **more: Any) -> str:
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=LIMIT, temperature=0, extra_body=more)
        return answer.choices[0].text

    raw = Framing(template="{input}")
    text = "x y"
    assert ask(text, "Zoë / 7", frame=False) == world.alone(text, "Zoë / 7", framing=raw)
    assert ask(text, "Zoë / 7", frame=False) != ask(text, "Zoë / 7")
    ids = frame(world.base, {"input": text}, raw)
    assert ask(ids, "Zoë / 7") == world.alone(text, "Zoë / 7", framing=raw)
    assert ask([ids, ids], "plain") == world.alone(text, "plain", framing=raw)
    record = {"name": "Fox", "price": 12}
    assert ask(text, "told", record={**record, "size": None}) == world.alone({"input": text, **record}, "told")
    assert ask(text, "chatty") == world.alone(text, "chatty")
    for more, message in [
        ({}, "expected text in the column 'name'"),
        ({"record": {"name": "Fox", "price": None}}, "expected text in the column 'price'"),
        ({"record": record, "frame": False}, "expected a record only where a prefix's template frames it"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            ask(text, "told", **more)
    for prompt, name in [(ids, "told"), (text, "chatty")]:
        with pytest.raises(openai.BadRequestError, match="expected a record only where a prefix's template frames it"):
            ask(prompt, name, record=record)
    with pytest.raises(openai.BadRequestError, match="expected token ids below 263; got 263"):
        ask([5, 263], "plain")


def test_stop(world: World, client: openai.OpenAI) -> None:
    prompt, text = next(
        (prompt, text)
        for prompt in map(str, range(100))
        if len(text := world.alone(prompt, "plain", max_new_tokens=30)) > 8 and "\ufffd" not in text[:6]
    )
    for stop in (text[3:5], ["never", text[4]]):
        stops = [stop] if isinstance(stop, str) else stop
        expected = world.alone(prompt, "plain", max_new_tokens=30, stop=stops)
        assert len(expected) < len(text)
        how: dict[str, Any] = {"model": "plain", "prompt": prompt, "max_tokens": 30, "temperature": 0, "stop": stop}
        (choice,) = client.completions.create(**how).choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        pieces = [choice.text for chunk in client.completions.create(**how, stream=True) for choice in chunk.choices]
        assert "".join(pieces) == expected


def test_logprobs(world: World, client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "plain", "prompt": "abc", "max_tokens": LIMIT, "temperature": 0}
    answer = client.completions.create(**how, logprobs=3)
    told = answer.choices[0].logprobs
    assert told is not None
    assert answer.usage is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == answer.usage.completion_tokens
    for word, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        # greedy: the token is the likeliest
        assert value == max(top.values()) == top[word]
        assert 1 <= len(top) <= 3
    assert told.text_offset is not None
    assert told.text_offset[0] == 0
    text = answer.choices[0].text
    for word, offset in zip(told.tokens, told.text_offset, strict=True):
        # but for what is no text: a special token, and a part of a character
        assert text.startswith(word, offset) or word not in text
    streamed = [
        choice.logprobs.token_logprobs
        for chunk in client.completions.create(**how, logprobs=3, stream=True)
        for choice in chunk.choices
        if choice.logprobs
    ]
    assert [value for values in streamed for value in values or []] == pytest.approx(told.token_logprobs, abs=1e-5)
    chat = client.chat.completions.create(
        model="chatty",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=LIMIT,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content
    for one in content.content:
        assert len(one.top_logprobs) == 2
        assert one.logprob == one.top_logprobs[0].logprob > one.top_logprobs[1].logprob
        assert one.bytes is None or bytes(one.bytes).decode() == one.token


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 2, "top_p": 1e-9, "seed": -(2**63), "logprobs": 20},
        {"temperature": 1e-300, "seed": -1},
        {"temperature": 0.01, "top_p": 1, "seed": 2**63 - 1, "n": 3},
        {"temperature": 2, "top_p": 0},
        {"temperature": 0, "top_p": 1e-300, "logprobs": 0, "stop": ["\U0010ffff" * 256] * 16},
        {"max_tokens": 118, "prompt": [0] * 8},
        {"max_tokens": 1, "prompt": [262] * 125},
    ],
    ids=str,
)
def test_what_is_just_allowed(client: openai.OpenAI, how: dict[str, Any]) -> None:
    answer = client.completions.create(**{"model": "plain", "prompt": "some text", "max_tokens": LIMIT, **how})
    assert len(answer.choices) == how.get("n", 1)
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}
    if how.get("top_p", 1) < 1 or how.get("temperature", 1) <= 0.01:
        greedy = {**how, "temperature": 0, "top_p": 1, "n": 1}
        expected = client.completions.create(**{"model": "plain", "prompt": "some text", "max_tokens": LIMIT, **greedy})
        assert {choice.text for choice in answer.choices} == {expected.choices[0].text}


MESSAGES: list[Any] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
]
FLAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


@pytest.mark.parametrize("name", [BASE, "chatty"])
def test_chat(world: World, client: openai.OpenAI, name: str) -> None:
    framing = Framing(chat=True)
    expected = world.alone({"messages": FLAT}, name, framing=framing)
    how: dict[str, Any] = {"model": name, "messages": MESSAGES, "temperature": 0}
    answer = client.chat.completions.create(**how, max_completion_tokens=LIMIT)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (expected, "assistant")
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(frame(world.base, {"messages": FLAT}, framing))
    chunks = list(
        client.chat.completions.create(
            **how, max_tokens=LIMIT, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    texts = {0: "", 1: ""}
    roles: dict[int, list[str]] = {0: [], 1: []}
    for chunk in chunks:
        for one in chunk.choices:
            texts[one.index] += one.delta.content or ""
            roles[one.index] += [one.delta.role] if one.delta.role else []
    assert texts == {0: expected, 1: expected}
    assert roles == {0: ["assistant"], 1: ["assistant"]}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * answer.usage.completion_tokens
    # without a limit, the context ends it
    long = client.chat.completions.create(**how)
    assert long.choices[0].message.content == world.alone({"messages": FLAT}, name, framing=framing, max_new_tokens=200)


def test_an_answer_is_said_again(world: World, client: openai.OpenAI) -> None:
    """As a chat goes on: with the message that came, as an object and as its fields, of which most are null."""
    first: dict[str, Any] = {"role": "user", "content": "hi"}
    how: dict[str, Any] = {"model": "chatty", "max_tokens": LIMIT, "temperature": 0}
    message = client.chat.completions.create(**how, messages=[first]).choices[0].message
    said = {"role": "assistant", "content": message.content}
    expected = world.alone({"messages": [first, said, first]}, "chatty", framing=Framing(chat=True))
    for again in (message, message.model_dump()):
        answer = client.chat.completions.create(**how, messages=[first, again, first])
        assert answer.choices[0].message.content == expected


def test_what_changes_nothing_is_taken(client: openai.OpenAI) -> None:
    shared = (
        "temperature",
        "top_p",
        "n",
        "stream",
        "presence_penalty",
        "frequency_penalty",
        "logprobs",
        "max_tokens",
        "seed",
        "stop",
    )
    nothing: dict[str, Any] = dict.fromkeys(shared)
    how: dict[str, Any] = {"model": "plain", "prompt": "xy", "max_tokens": 2}
    more: dict[str, Any] = dict.fromkeys(("echo", "suffix", "best_of", "logit_bias", "user", "record", "tools"))
    assert client.post("/completions", body=how | nothing | more | {"max_tokens": 2}, cast_to=object)
    more = {
        "response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto", "tools": None,
        "stream_options": {"include_obfuscation": False, "include_usage": None},
    }  # fmt: skip
    chat: dict[str, Any] = {"model": "chatty", "messages": [{"role": "user", "content": "hi", "tool_calls": None}]}
    assert client.post("/chat/completions", body=chat | nothing | more | {"max_tokens": 2}, cast_to=object)
    for field, value in [("response_format", {"type": "json_object"}), ("tools", []), ("modalities", ["audio"])]:
        with pytest.raises(openai.BadRequestError, match=field):
            client.post("/chat/completions", body=chat | {field: value}, cast_to=object)


def test_chat_is_refused(world: World, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'plain' was not trained on chats") as caught:
        client.chat.completions.create(model="plain", messages=MESSAGES)
    assert caught.value.code == "not_a_chat_model"
    with pytest.raises(openai.BadRequestError, match="expected the last message to be the user's"):
        client.chat.completions.create(model="chatty", messages=[*MESSAGES, {"role": "assistant", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="expected logprobs to be true"):
        client.chat.completions.create(model="chatty", messages=MESSAGES, top_logprobs=2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "nobody"}, "no model 'nobody'"),
        ({"model": "a\nb"}, "no model"),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": 2.01}, "temperature: "),
        ({"n": 0}, "n: "),
        ({"n": 128, "prompt": ["a", "b", "c"]}, "expected at most 128 texts of one request; got 384"),
        ({"prompt": ""}, ""),
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 1000}, "expected at most 118 for max_tokens, which the context of 131 leaves after 8 tokens of input and 5"),
        ({"prompt": "x" * 127, "max_tokens": 1}, "expected at most 131 positions"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop: expected a text or a list of texts"),
        ({"extra_body": {"record": {"a": [1]}}}, "record: expected a text or a number in each column"),
        ({"extra_body": {"record": {"a": True}}}, "record: expected a text or a number in each column"),
        ({"extra_body": {"record": dict.fromkeys(map(str, range(101)), 1)}}, "record: expected at most 100 columns; got 101"),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"echo": True}, "echo: "),
        ({"max_tokens": "3"}, "max_tokens: Input should be a valid integer"),
        ({"n": True}, "n: Input should be a valid integer"),
        ({"temperature": "0.5"}, "temperature: "),
        ({"prompt": [True, 3]}, "prompt"),
        ({"extra_body": {"frame": "no"}}, "frame: "),
        ({"best_of": 3}, "expected best_of to be the same as n"),
        ({"prompt": "\ud800"}, ""),
        ({"extra_body": {"guided": 1}}, "guided: "),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client: openai.OpenAI, body: dict[str, Any], message: str, stream: bool) -> None:
    how = {"model": "plain", "prompt": "abcdef", "max_tokens": 5, **body, "stream": stream}
    if body == {"prompt": ""}:
        # the prefix's template adds a line break to it
        client.completions.create(**how)
        return
    with pytest.raises((openai.BadRequestError, openai.NotFoundError, UnicodeEncodeError)) as caught:
        client.completions.create(**how)
    if isinstance(caught.value, openai.APIStatusError):
        error = caught.value.body
        assert isinstance(error, dict)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].startswith(message)
        assert "\n" not in error["message"]
        assert caught.value.status_code == (404 if message.startswith("no model") else 400)


def test_many_at_once_asynchronously(world: World) -> None:
    names = (BASE, "plain", "Zoë / 7")

    async def run() -> list[tuple[str, str, str]]:
        async with asynchronous(world) as client:

            async def ask(i: int) -> tuple[str, str, str]:
                name, prompt = names[i % 3], "xy" * (1 + i % 5)
                await asyncio.sleep(i % 7 / 100)
                if i % 2:
                    answer = await client.completions.create(model=name, prompt=prompt, max_tokens=LIMIT, temperature=0)
                    return name, prompt, answer.choices[0].text
                text = ""
                stream = await client.completions.create(
                    model=name, prompt=prompt, max_tokens=LIMIT, temperature=0, stream=True
                )
                async for chunk in stream:
                    text += "".join(choice.text for choice in chunk.choices)
                return name, prompt, text

            return await asyncio.gather(*(ask(i) for i in range(30)))

    for name, prompt, text in asyncio.run(run()):
        assert text == world.alone(prompt, name)


def test_asynchronous_chat(world: World) -> None:
    async def run() -> tuple[str | None, str]:
        async with asynchronous(world) as client:
            how: dict[str, Any] = {"model": "chatty", "messages": MESSAGES, "max_tokens": LIMIT, "temperature": 0}
            whole = await client.chat.completions.create(**how)
            text = ""
            async for chunk in await client.chat.completions.create(**how, stream=True):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
            return whole.choices[0].message.content, text

    expected = world.alone({"messages": FLAT}, "chatty", framing=Framing(chat=True))
    assert asyncio.run(run()) == (expected, expected)


def test_two_tenants_ask_the_same(world: World) -> None:
    """At the same time, with as many virtual tokens each, and an x that fills blocks of vLLM's cache."""
    world.put("tenant", prefix_for(world.base, 5, seed=1))
    names = ("plain", "tenant", BASE)
    prompts = (f"{n}: " + "the very same text, of two tenants " * 2 for n in range(99))
    prompt = next(prompt for prompt in prompts if all(world.alone(prompt, name) for name in names))
    expected = {name: world.alone(prompt, name) for name in names}
    assert len(set(expected.values())) == 3
    before = world.engine.figures().more.get("cache_hits", 0)

    async def run() -> list[tuple[str, str]]:
        async with asynchronous(world) as client:

            async def ask(i: int) -> tuple[str, str]:
                await asyncio.sleep(random.Random(i).random() / 5)
                how: dict[str, Any] = {"model": names[i % 3], "prompt": prompt, "max_tokens": LIMIT, "temperature": 0}
                answer = await client.completions.create(**how)
                return names[i % 3], answer.choices[0].text

            return list(await asyncio.gather(*(ask(i) for i in range(24))))

    for name, text in asyncio.run(run()):
        assert text == expected[name]
    if world.engine.name == "vllm":
        # two blocks at the least for each but the first of a name, if they came one after another
        assert world.engine.figures().more["cache_hits"] - before >= 2 * BLOCK
    world.delete("tenant")


def test_what_cannot_be_served_fails_alone(world: World, client: openai.OpenAI) -> None:
    good = prefix_for(world.base, 4, seed=5)
    world.put("foreign", Prefix(good.sections, Card(base="another", fingerprint="1" * 64)))
    world.put("damaged", good).write_bytes(b"?")
    file = world.put("damaged later", prefix_for(world.base, 4, seed=6))
    # its card is known by now, so that it is the engine that finds out
    assert client.models.retrieve("damaged later").id == "damaged later"
    file.write_bytes(file.read_bytes()[:999])
    how: dict[str, Any] = {"prompt": "some text", "max_tokens": LIMIT, "temperature": 0}
    expected = world.alone("some text", "plain")
    for name, error, code in [
        ("nobody", openai.NotFoundError, "model_not_found"),
        ("foreign", openai.BadRequestError, "wrong_base"),
        ("damaged", openai.InternalServerError, "prefix_damaged"),
        ("damaged later", openai.InternalServerError, "prefix_damaged"),
    ]:
        for stream in (False, True):
            with client.completions.create(model="plain", **how, stream=True) as beside:
                with pytest.raises(error) as caught:
                    client.completions.create(model=name, **how, stream=stream)
                assert caught.value.code == code
                assert "".join(choice.text for chunk in beside for choice in chunk.choices) == expected
    world.delete("foreign", "damaged", "damaged later")


def test_too_many_and_who_hangs_up(world: World, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 texts are let in, many more than there are rows; when their client has gone, so have they."""
    how: dict[str, Any] = {"model": "plain", "prompt": "xy", "temperature": 1.5, "max_tokens": 99}
    service = world.app.state.service

    def abandoned() -> float:
        (family,) = service.metrics.abandoned.collect()
        return next(sample.value for sample in family.samples if sample.name.endswith("_total"))

    monkeypatch.setattr(service.limits, "max_texts", 128)
    before = abandoned()
    with client.completions.create(**how, n=128, stream=True) as stream:
        next(iter(stream))
        assert service.limits.under_way == 128
        for streamed in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**how, stream=streamed)
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    until(world.idle)
    until(lambda: abandoned() == before + 1)
    text = client.completions.create(model="plain", prompt="xy", max_tokens=LIMIT, temperature=0).choices[0].text
    assert text == world.alone("xy", "plain")
    until(world.idle)
    # of vLLM; its figures come with its steps
    assert world.engine.figures().more.get("cache_usage", 0) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up(world: World, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(world.app.state.service, "settings", Settings(timeout=0.05))
    how: dict[str, Any] = {"model": "plain", "prompt": "xy", "temperature": 1.5, "max_tokens": 99, "n": 128}
    with pytest.raises(openai.APIError, match="the answer took longer than this server allows"):
        list(client.completions.create(**how, stream=stream))
    until(world.idle)


def test_figures(world: World, client: openai.OpenAI) -> None:
    for _ in range(2):
        client.completions.create(model="plain", prompt="xy", max_tokens=2)
    names = {"route", "status", "what", "le"}
    seen: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{world.url}/metrics").text):
        for sample in family.samples:
            assert set(sample.labels) <= names
            seen[sample.name] = sample.value
    assert seen["foreword_engine_prefix_loads_total"] >= 1
    assert seen["foreword_engine_prefix_hits_total"] >= 1
    assert seen["foreword_engine_resident_prefixes"] >= 1
    assert 0 < seen["foreword_engine_resident_bytes"] <= seen["foreword_engine_resident_budget_bytes"]
    assert seen["foreword_time_to_first_token_seconds_count"] >= 2


def test_an_encoder_decoder_base(tmp_path: Path) -> None:
    """Its prefixes have three sections, and virtual tokens take none of its context."""
    base = make_base("bart")
    prefix = next(p for p in (prefix_for(base, 5, seed=seed) for seed in range(99)) if generate(base, ["xy"], [p])[0])
    store = Store(tmp_path / "store", create=True)
    store.put("summary", prefix, dtype=torch.float32)
    copied = copy_of(base)
    app = create_app(copied, store, engine=LocalEngine(copied, store))
    with served(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        long = "x" * (CONTEXT - 3)  # <s>, a line break and </s> more
        for prompt in ("xy", long):
            expected = {
                name: generate(
                    base, [prompt], [given], framing=framing, settings=GenerateSettings(max_new_tokens=LIMIT)
                )[0]
                for name, given, framing in (
                    ("summary", prefix, None),
                    ("tiny-bart", None, Framing(template="{input}")),
                )
            }
            assert expected["summary"] != expected["tiny-bart"]
            for name, text in expected.items():
                how: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": LIMIT, "temperature": 0}
                answer = client.completions.create(**how)
                assert answer.choices[0].text == text
                chunks = client.completions.create(**how, stream=True)
                assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == CONTEXT - 1
        with pytest.raises(openai.BadRequestError, match="expected at most 131 positions"):
            client.completions.create(model="summary", prompt=f"{long}y", max_tokens=3)


def test_a_base_without_a_chat_template(tmp_path: Path) -> None:
    base: Base = make_base("gpt2")
    store = Store(tmp_path / "store", create=True)
    app = create_app(base, store, engine=LocalEngine(base, store), base_name="theirs")
    with served(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["theirs"]
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model="theirs", messages=MESSAGES)
        assert client.completions.create(model="theirs", prompt="a", max_tokens=3).choices[0].text is not None
