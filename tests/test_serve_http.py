"""What stands before the engine: keys, limits, uploads, hang-ups, stopping, figures and logs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from safetensors.torch import save
from serving import make_base, prefix_for, reference_base, served, until

import foreword
from foreword.errors import SettingsError
from foreword.prefix import Card, Prefix
from foreword.serve import FakeEngine, Figures, Key, KeyFile, Request, Settings, create_app, run
from foreword.serve.catalog import Catalog
from foreword.serve.limits import Limits, TooManyError
from foreword.serve.logs import JsonFormatter
from foreword.serve.schemas import ChatRequest, CompletionRequest
from foreword.serve.server import check_address
from foreword.store import Store, Version

BASE = "tiny-llama"


class World:
    """A server with a fake engine, which says the prefix's name first."""

    def __init__(
        self,
        folder: Path,
        *,
        keys: bool = False,
        script: Callable[[Request], Sequence[str]] | None = None,
        engine: FakeEngine | None = None,
        **settings: Any,
    ):
        self.base = reference_base("llama")
        self.store = Store(folder / "store", create=True)
        self.engine = engine or (FakeEngine() if script is None else FakeEngine(script))
        self.keys = KeyFile(folder / "keys.json") if keys else None
        self.app = create_app(self.base, self.store, engine=self.engine, keys=self.keys, settings=Settings(**settings))
        self.url = ""

    def put(self, *names: str, **framing: Any) -> None:
        for name in names:
            self.store.put(name, prefix_for(self.base, 5, seed=len(name), **framing))

    @contextmanager
    def running(self) -> Iterator[World]:
        with served(self.app) as url:
            self.url = url
            yield self

    def http(self, key: str | None = None, **more: Any) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **more)

    def complete(self, client: httpx.Client, model: str = BASE, **more: Any) -> httpx.Response:
        return client.post("/v1/completions", json={"model": model, "prompt": "xyz", **more})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path).running() as world:
        yield world


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]  # type: ignore[no-any-return]


# who may what


def test_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world = World(tmp_path, keys=True)
    assert world.keys is not None
    world.put("team/a", "team/b", "alone", "*", "Zoë")
    _, team = world.keys.add(label="team", prefixes=("team/*", "Zoe\u0308"))
    _, alone = world.keys.add(prefixes=("alone",))
    _, admin = world.keys.add(admin=True)
    with world.running(), world.http() as nobody:
        for given in (
            "",
            "Bearer",
            f"Bearer {team[:-1]}",
            f"Bearer {team}x",
            f"Basic {team}",
            "Bearer fw-00000000-x",
            "Bearer ключ".encode(),
        ):
            for method, path in [
                ("GET", "/v1/models"), ("GET", "/v1/models/alone"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
                ("GET", "/v1/prefixes"), ("GET", "/v1/prefixes/alone"), ("PUT", "/v1/prefixes/alone"), ("DELETE", "/v1/prefixes/alone"),
                ("GET", "/metrics"),
            ]:  # fmt: skip
                answer = nobody.request(method, path, headers={"authorization": given} if given else {})
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert error_of(answer)["code"] == "invalid_api_key"
        assert nobody.get("/health").status_code == nobody.get("/ready").status_code == 200

        def models(key: str) -> list[str]:
            with world.http(key) as client:
                return [model["id"] for model in client.get("/v1/models").json()["data"]]

        assert models(team) == [BASE, "Zoë", "team/a", "team/b"]
        assert models(alone) == [BASE, "alone"]
        assert models(admin) == [BASE, "*", "Zoë", "alone", "team/a", "team/b"]
        with world.http(team) as client:
            for name in ("team/a", "Zoë", "Zoe\u0308", BASE):
                assert (
                    world.complete(client, name)
                    .json()["choices"][0]["text"]
                    .startswith("-" if name == BASE else unicodedata.normalize("NFC", name))
                )
            # another's is not there, and says so in the same words
            answers = [world.complete(client, name) for name in ("alone", "*", "nobody", "team")]
            assert {answer.status_code for answer in answers} == {404}
            words = [error_of(answer)["message"] for answer in answers]
            assert len({re.sub("'.*?'", "", text) for text in words}) == 1
            assert words[0] == "no model 'alone': see /v1/models for those that you may use"
            answers = [client.get(f"/v1/models/{name}") for name in ("alone", "nobody")]
            assert [answer.status_code for answer in answers] == [404, 404]
            for method, path in (
                ("GET", "/v1/prefixes"),
                ("PUT", "/v1/prefixes/team/a"),
                ("DELETE", "/v1/prefixes/team/a"),
                ("GET", "/metrics"),
            ):
                answer = client.request(method, path)
                assert (answer.status_code, error_of(answer)["code"]) == (403, "not_allowed")
        with world.http(admin) as client:
            assert client.get("/v1/prefixes/team/a").json()["name"] == "team/a"
            assert client.get("/metrics").status_code == 200
        # nor are its damage and its size to be told: it is not looked at
        (file,) = (tmp_path / "store").rglob(f"*{world.store.newest('alone').sha256}.safetensors")
        good = file.read_bytes()
        file.write_bytes(b"?")
        with world.http(team) as client:
            assert world.complete(client, "alone").status_code == client.get("/v1/models/alone").status_code == 404
        file.write_bytes(good)
        # keys that come and go count within seconds
        key, late = world.keys.add(prefixes=("alone",))
        KeyFile(world.keys.path).remove(key.id)
        _, late = KeyFile(world.keys.path).add(prefixes=("alone",))
        with world.http(late) as client:
            until(lambda: world.complete(client, "alone").status_code == 200)
    for secret in (team, alone, admin, late):
        assert secret not in caplog.text
        assert secret not in world.keys.path.read_text()
        assert secret.split("-", 2)[2] not in caplog.text
    assert "xyz" not in caplog.text


def test_the_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = KeyFile(path)
    assert keys.known() == []
    key, text = keys.add(label="x", prefixes=("a*b", "c[d]"), concurrency=2)
    assert path.stat().st_mode & 0o777 == 0o600
    assert KeyFile(path).find(text) == key
    assert keys.find(text[:-1] + ("A" if text[-1] != "A" else "B")) is None
    assert [key.may_use(name) for name in ("ab", "a\nxb", "abc", "c[d]", "cd", "A b")] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(SettingsError, match="no key 'zz'"):
        keys.remove("zz")
    with pytest.raises(SettingsError, match="expected concurrency as a whole number of at least 1; got 0"):
        keys.add(concurrency=0)
    assert keys.remove(key.id).id == key.id
    assert KeyFile(path).find(text) is None
    path.chmod(0o640)
    _, text = keys.add(admin=True)
    # whoever may read it may go on to
    assert path.stat().st_mode & 0o777 == 0o640
    for bad in (b"{", b"[]", b"\xff\xfe", b'{"format": 1, "keys": [{"id": 1}]}', b'{"format": 2, "keys": []}'):
        path.write_bytes(bad)
        with pytest.raises(SettingsError, match="expected a file of API keys"):
            KeyFile(path)
    for odd, message in {
        # which would be every name that * stands for, and an admin
        '"prefixes": "team/*"': "expected prefixes to be a list of names; got 'team/\\*'",
        '"prefixes": [1]': r"expected prefixes to be a list of names; got \[1\]",
        '"prefixes": null': "expected prefixes to be a list of names; got None",
        '"admin": "no"': "expected admin to be true or false; got 'no'",
        '"id": ["x"]': r"expected id as text; got \['x'\]",
        '"label": 5': "expected label as text; got 5",
        '"created": 5': "expected created as text; got 5",
        '"tokens_per_minute": NaN': "expected tokens_per_minute as a whole number of at least 1; got nan",
        '"concurrency": "5"': "expected concurrency as a whole number of at least 1; got '5'",
    }.items():
        path.write_text(
            json.dumps({"format": 1, "keys": [{"id": "1", "sha256": ""}]}).replace('"sha256"', f'{odd}, "sha256"')
        )
        with pytest.raises(SettingsError, match=f"keys.json: one of its API keys is none: {message}$"):
            KeyFile(path)
    with pytest.raises(SettingsError, match="expected prefixes to be a list of names; got 'a'"):
        Key(id="", sha256="", prefixes="a")  # type: ignore[arg-type]


def test_a_file_of_keys_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under a running server, by somebody's editor: the keys that were known stay known, and the log says so once."""
    monkeypatch.setattr("foreword.serve.access.RELOAD", 0)
    keys = KeyFile(tmp_path / "keys.json")
    _, text = keys.add(admin=True)
    good = keys.path.read_bytes()
    assert keys.find(text) is not None
    keys.path.write_bytes(good[:-9])
    assert keys.find(text) is not None
    assert keys.find(text) is not None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the keys that were known stay known"
    ]
    with pytest.raises(SettingsError, match="expected a file of API keys"):
        keys.add(admin=True)
    assert keys.path.read_bytes() == good[:-9]
    for odd in (b"[" * 100_000, re.sub(rb'"sha256": "\w+"', b'"sha256": null', good)):
        keys.path.write_bytes(odd)
        assert keys.find(text) is not None
    keys.path.write_bytes(good.replace(b"true", b"false"))
    found = keys.find(text)
    assert found is not None
    assert not found.admin
    keys.path.unlink()
    assert keys.find(text) is None
    keys.path.mkdir()
    with pytest.raises(SettingsError, match="cannot read the file of API keys at"):
        KeyFile(keys.path)


def test_addresses() -> None:
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        check_address(host, keys=False)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org", ""):
        check_address(host, keys=True)
        with pytest.raises(SettingsError, match="expected API keys where others can reach the server"):
            check_address(host, keys=False)


# prefixes over HTTP


def test_prefixes(world: World) -> None:
    files = [prefix_for(world.base, length, template=f"{length}: {{input}}") for length in (3, 4)]
    with world.http() as client:
        for name in ("plain", "a/../b", "Zoë 🙂?#", "%2e%2e", "CON"):
            quoted = "/v1/prefixes/" + "".join(f"%{byte:02x}" for byte in name.encode())
            for i, prefix in enumerate(files):
                data = prefix.to_bytes()
                answer = client.put(quoted, content=data)
                assert answer.status_code == 201, answer.text
                assert answer.json()["sha256"] == world.store.newest(name).sha256
                shown = client.get(quoted).json()
                assert (shown["name"], shown["length"], len(shown["versions"])) == (name, prefix.length, i + 1)
                assert shown["card"] == json.loads(prefix.card.to_json())
                assert shown["sections"] == {"decoder": 3}
                # the very next request has it
                assert world.complete(client, name).status_code == 200
                assert world.engine.requests[-1].prefix == world.store.newest(name)
        listed = client.get("/v1/prefixes", params={"limit": 2}).json()
        assert [one["name"] for one in listed["data"]] == ["%2e%2e", "CON"]
        rest = client.get("/v1/prefixes", params={"after": listed["cursor"]}).json()
        assert [one["name"] for one in rest["data"]] == ["Zoë 🙂?#", "a/../b", "plain"]
        assert rest["cursor"] is None
        assert [one["name"] for one in client.get("/v1/prefixes", params={"begins": "a/"}).json()["data"]] == ["a/../b"]
        contents = {version.sha256 for version in world.store.versions("plain")}
        answer = client.delete("/v1/prefixes/plain")
        assert answer.json() == {"name": "plain", "versions": 2, "deleted": True}
        assert world.engine.forgotten == contents
        assert world.complete(client, "plain").status_code == 404
        for method in ("DELETE", "GET"):
            assert error_of(client.request(method, "/v1/prefixes/plain"))["code"] == "model_not_found"


def test_hostile_uploads(tmp_path: Path) -> None:
    world = World(tmp_path, max_upload=1_000_000)
    world.engine.figures = lambda: Figures(budget_bytes=30_000)  # type: ignore[method-assign]
    good = prefix_for(world.base, 5)
    data = good.to_bytes()

    def card(**more: Any) -> bytes:
        return Prefix(good.sections, Card(base="b", fingerprint=world.base.fingerprint, **more)).to_bytes()

    def odd_card(**more: Any) -> bytes:
        """By hand, since foreword writes no such card."""
        zeros = {name: torch.zeros_like(one) for name, one in tensors.items()}
        return save(zeros, {"foreword": json.dumps({**json.loads(good.card.to_json()), **more})})

    def huge(number: float, dtype: torch.dtype) -> bytes:
        """Finite, and yet of no use in the base's own dtype."""
        layers = [(keys.to(dtype, copy=True), values.to(dtype, copy=True)) for keys, values in good.sections["decoder"]]
        layers[2][1][1, 2, 3] = number
        return Prefix({"decoder": layers}, good.card).to_bytes(dtype)

    def header(length: int) -> bytes:
        return length.to_bytes(8, "little") + data[8:]

    nan = [(keys.clone(), values.clone()) for keys, values in good.sections["decoder"]]
    tensors = {
        f"decoder.{i}.{kind}": one.clone()
        for i, layer in enumerate(nan)
        for kind, one in zip(("keys", "values"), layer, strict=True)
    }
    meta = {"foreword": good.card.to_json()}
    tensors["decoder.1.keys"][1, 2, 3] = torch.nan
    wrong_shapes = {name: torch.zeros(2, 5, 13) for name in tensors}
    fewer = {name: one for name, one in tensors.items() if not name.startswith("decoder.2")}
    fewer["decoder.1.keys"] = torch.zeros_like(fewer["decoder.1.keys"])
    deep = b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"
    bad: dict[str, bytes] = {
        "empty": b"",
        "text": b"hello, world",
        "truncated": data[:-1],
        "half": data[: len(data) // 2],
        "header alone": data[:8],
        "longer": data + b"\0",
        "giant header": header(1 << 62),
        "large header": header(200_000_000),
        "odd header": header(17),
        "deep header": len(deep).to_bytes(8, "little") + deep,
        "no card": save({name: torch.zeros_like(one) for name, one in tensors.items()}),
        "nan": save(tensors, meta),
        "wrong shapes": save(wrong_shapes, meta),
        "fewer layers": save(fewer, meta),
        "other tensors": save({**{n: torch.zeros_like(t) for n, t in tensors.items()}, "evil": torch.zeros(1)}, meta),
        "no tensors": save({}, meta),
        "integers": save({name: torch.zeros(one.shape, dtype=torch.int32) for name, one in tensors.items()}, meta),
        "another base": Prefix(good.sections, Card(base="b", fingerprint="0" * 64)).to_bytes(),
        "nan in the card": odd_card(metrics={"loss": float("nan")}),
        "infinity in the card": odd_card(training={"lr": [1e999]}),
        "bad template": card(framing=foreword.Framing(template="{input.__class__}")),
        "broken template": card(framing=foreword.Framing(template="{")),
        "huge numbers": huge(1e300, torch.float64),
        "large numbers": huge(-1.1e6, torch.float32),
        "too long": prefix_for(world.base, 131).to_bytes(),
        "too much memory": prefix_for(world.base, 100).to_bytes(),
        "too large": b"x" * 1_000_001,
    }
    with world.running(), world.http() as client:
        for name, content in bad.items():
            answer = client.put("/v1/prefixes/" + name, content=content)
            assert answer.status_code == (
                413 if (name.startswith("too l") and name != "too long") or name == "too much memory" else 400
            ), (name, answer.text)
            error_of(answer)

        def endless() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 100_000

        answer = client.put("/v1/prefixes/endless", content=endless())
        assert answer.status_code == 413
        for path in (
            "/v1/prefixes/",
            f"/v1/prefixes/{BASE}",
            "/v1/prefixes/a%0Ab",
            "/v1/prefixes/a%00b",
            "/v1/prefixes/" + "x" * 257,
        ):
            # no route has a line break in it
            assert client.put(path, content=data).status_code == (404 if "%0A" in path else 400), path
        assert world.store.page().versions == []
        names = ("../../etc/passwd", "/etc/passwd", "..%2f..", "a\\b", ".", "C:\\x")
        for name in names:
            quoted = "".join(f"%{byte:02x}" for byte in name.encode())
            answer = client.put("/v1/prefixes/" + quoted, content=data)
            if name == ".":
                # clients and servers take a lone dot for the folder itself
                assert answer.status_code in (201, 400)
                continue
            assert answer.status_code == 201
            assert world.store.get(name).length == 5
        assert {path.parts[0] for path in (p.relative_to(tmp_path) for p in tmp_path.rglob("*"))} == {"store"}
    assert list(world.store.verify()) == []


def test_a_replica_sees_changes(tmp_path: Path) -> None:
    one, two = World(tmp_path), World(tmp_path)
    data = prefix_for(one.base, 5).to_bytes()
    other = prefix_for(one.base, 4).to_bytes()
    with one.running(), two.running(), one.http() as here, two.http() as there:
        assert here.put("/v1/prefixes/p", content=data).status_code == 201
        until(lambda: two.complete(there, "p").status_code == 200)
        old = one.store.newest("p")
        assert here.put("/v1/prefixes/p", content=other).status_code == 201
        new = one.store.newest("p")

        def replaced() -> bool:
            two.complete(there, "p")
            return two.engine.requests[-1].prefix == new

        until(replaced)
        assert here.delete("/v1/prefixes/p").status_code == 200
        until(lambda: two.complete(there, "p").status_code == 404)
        # its memory too
        until(lambda: two.engine.forgotten == {old.sha256, new.sha256})
    with World(tmp_path).running() as again, again.http() as client:
        assert again.complete(client, "p").status_code == 404


def test_a_change_while_a_name_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was looked up before an upload is not believed after it."""
    store = Store(tmp_path / "store", create=True)
    old = store.put("p", prefix_for(reference_base("llama"), 5))
    found, go_on = threading.Event(), threading.Event()
    newest = store.newest

    def slowly(name: str) -> Version:
        version = newest(name)
        found.set()
        assert go_on.wait(20)
        return version

    monkeypatch.setattr(store, "newest", slowly)

    async def run() -> None:
        catalog = Catalog(store, FakeEngine(), 20)
        early = asyncio.create_task(catalog.find("p"))
        await asyncio.to_thread(found.wait, 20)
        new = store.put("p", prefix_for(reference_base("llama"), 4))
        catalog.forget_name("p")
        go_on.set()
        assert (await early).version == old
        assert (await catalog.find("p")).version == new
        assert new != old

    asyncio.run(run())


def test_damaged_and_foreign_prefixes_of_the_store(world: World, tmp_path: Path) -> None:
    world.put("good", "damaged")
    foreign = prefix_for(world.base, 5)
    world.store.put("foreign", Prefix(foreign.sections, Card(base="other", fingerprint="1" * 64)))
    (file,) = (tmp_path / "store").rglob(f"*{world.store.newest('damaged').sha256}.safetensors")
    file.write_bytes(b"?")
    narrow = {"decoder": [(keys[:1, :, :3], values[:1, :, :3]) for keys, values in foreign.sections["decoder"]]}
    with world.http() as client:
        answer = world.complete(client, "damaged")
        assert (answer.status_code, error_of(answer)["code"]) == (500, "prefix_damaged")
        for card, message in (
            (foreign.card, "the prefix's layers do not fit the base that its card names: the file is damaged"),
            (
                Card(base="/some/path", fingerprint="1" * 64),
                f"expected a prefix of '{BASE}'; this one was trained on another base",
            ),
        ):
            answer = client.put("/v1/prefixes/x", content=Prefix(narrow, card).to_bytes())
            assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_prefix_file")
            assert error_of(answer)["message"] == message
        answer = world.complete(client, "foreign")
        assert (answer.status_code, error_of(answer)["code"]) == (400, "wrong_base")
        assert world.complete(client, "good").status_code == 200


def test_a_store_that_has_gone_is_no_prefix_that_has(world: World, tmp_path: Path) -> None:
    """Its volume may be mounted again: nobody is told that a prefix was deleted, and nothing is written beside it."""
    world.put("alice", "bob")
    with world.http() as client:
        assert world.complete(client, "alice").status_code == 200
        (tmp_path / "store").rename(tmp_path / "moved")
        assert world.complete(client, "alice").status_code == 200  # it is in memory
        answer = world.complete(client, "bob")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert error_of(answer)["code"] == "store_unavailable"
        assert client.put("/v1/prefixes/new", content=prefix_for(world.base, 5).to_bytes()).status_code == 503
        assert client.delete("/v1/prefixes/bob").status_code == 503
        assert not (tmp_path / "store").exists()
        (tmp_path / "moved").rename(tmp_path / "store")
        assert world.complete(client, "bob").status_code == 200
        assert world.complete(client, "none").status_code == 404


def test_a_store_that_hangs_keeps_nobody_else_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the end of the server."""
    world = World(tmp_path, timeout=3.0, grace=0.0)
    world.put("alice", "bob")
    read, go_on = world.store.read, threading.Event()

    def hang(version: Version) -> bytes:
        if version.name == "bob":
            go_on.wait(60)
        return read(version)

    monkeypatch.setattr(world.store, "read", hang)
    try:
        with world.running(), world.http() as client, ThreadPoolExecutor(9) as clients:
            assert world.complete(client, "alice").status_code == 200
            hung = [clients.submit(world.complete, client, "bob") for _ in range(9)]
            for model in ("alice", BASE):
                assert world.complete(client, model).status_code == 200
            assert not any(one.done() for one in hung)
            for one in hung:
                assert (one.result().status_code, error_of(one.result())["code"]) == (503, "store_unavailable")
            began = time.monotonic()
        assert time.monotonic() - began < 15
    finally:
        go_on.set()


def test_threads_that_hang_do_not_keep_the_process(tmp_path: Path) -> None:
    script = """if True:
        import sys, threading
        from foreword.serve.waiting import leave_hung_threads
        threading.Thread(target=lambda: threading.Event().wait(0.1)).start()
        leave_hung_threads(20, 5)
        print("those that end are waited for")
        threading.Thread(target=threading.Event().wait).start()
        leave_hung_threads(0.1, 7)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "those that end are waited for\n")


def test_nothing_of_a_request_is_read_before_it_is_known_whose_it_is(tmp_path: Path) -> None:
    world = World(tmp_path, keys=True)
    assert world.keys is not None
    _, key = world.keys.add()
    with world.running(), world.http() as nobody, world.http(key) as client:
        for path, method in (("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/prefixes/a", "PUT")):
            sent = []

            def body(sent: list[int] = sent) -> Iterator[bytes]:
                for n in range(4000):
                    sent.append(n)
                    yield b"[" * 1000

            for content in (b"{", body()):
                answer = nobody.request(method, path, content=content, headers={"content-type": "application/json"})
                assert answer.status_code == 401, path
                assert error_of(answer)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/completions", content=b"{").status_code == 400


def test_a_name_that_is_no_text_is_refused(world: World) -> None:
    data = prefix_for(world.base, 5).to_bytes()
    with world.http() as client:
        for name in ("%ff", "a%ed%a0%80"):
            for method in ("PUT", "DELETE"):
                answer = client.request(method, f"/v1/prefixes/{name}", content=data)
                assert (answer.status_code, error_of(answer)["param"]) == (400, "name")
        assert client.put("/v1/prefixes/Zo%C3%AB", content=data).json()["name"] == "Zoë"


@pytest.mark.parametrize("name", ["timeout", "grace"])
def test_times_that_never_end_are_refused(name: str) -> None:
    for value in (math.inf, math.nan, -1.0):
        with pytest.raises(SettingsError, match=f"expected {name} as a number of seconds; got {value}"):
            Settings(**{name: value})


def test_a_prefix_that_is_called_as_the_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path)
    world.put(BASE, "other")
    with caplog.at_level(logging.WARNING, "foreword"), world.running(), world.http() as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [BASE, "other"]
        assert world.complete(client, BASE).status_code == 200
        assert world.engine.requests[-1].prefix is None
    assert [record.getMessage() for record in caplog.records] == [
        f"the prefix '{BASE}' is never used: the base is called so; see --base-name"
    ]


# under load


@pytest.mark.parametrize(("method", "path"), [("PUT", "/v1/prefixes/p"), ("POST", "/v1/completions")])
def test_who_hangs_up_while_sending(world: World, method: str, path: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = world.url.removeprefix("http://").split(":")
    with caplog.at_level(logging.ERROR, "foreword"), world.http() as client:
        with socket.create_connection((host, int(port))) as own:
            head = (
                f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
            )
            own.sendall(head.encode() + b'{"a')
        until(lambda: figures(client)["foreword_abandoned_total", ()] == 1)
        statuses = {
            dict(labels)["status"]
            for (name, labels) in figures(client)
            if name == "foreword_requests_total" and dict(labels)["route"].split("{")[0] in path
        }
        assert statuses == {"499"}
    assert not caplog.records


@pytest.mark.parametrize("said", ["content-length: 99", "transfer-encoding: chunked"])
@pytest.mark.parametrize(("method", "path"), [("PUT", "/v1/prefixes/p"), ("POST", "/v1/completions")])
def test_who_sends_forever(tmp_path: Path, method: str, path: str, said: str) -> None:
    """And who waits long for an answer, when the request is whole, is not taken for one."""
    world = World(tmp_path, timeout=1.0)
    with world.running(), world.http() as client:
        host, port = world.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as own:
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{said}\r\n\r\n"
            own.sendall(head.encode() + (b"1\r\n{\r\n" if "chunked" in said else b"{"))
            answer = own.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.1 408 ")
        assert "expected the whole request within 1 s; send it faster" in answer
        assert "connection: close" in answer.lower(), "uvicorn would keep it for 5 s"
        world.engine.open.clear()
        assert world.complete(client).status_code == 504


def test_a_request_s_texts_are_its_prompts_times_n(tmp_path: Path) -> None:
    world = World(tmp_path, max_texts=1000)
    with world.running(), world.http() as client:
        assert len(world.complete(client, prompt=["x"] * 64, n=2).json()["choices"]) == 128
        answer = world.complete(client, prompt=["x"] * 65, n=2)
        assert answer.status_code == 400
        assert error_of(answer)["message"] == "expected at most 128 texts of one request; got 130"


def test_words_of_log_probabilities_are_made_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    service = world.app.state.service
    decoded: list[list[int]] = []
    real = world.base.tokenizer.decode
    monkeypatch.setattr(world.base.tokenizer, "decode", lambda ids, **how: decoded.append(ids) or real(ids, **how))
    assert [service.word(65), service.word(66), service.word(65)] == [
        service.word(65),
        service.word(66),
        service.word(65),
    ]
    assert decoded == [[65], [65, 65], [66], [66, 66]]


def test_a_body_that_is_not_said_to_be_json(world: World) -> None:
    with world.http() as client:
        answer = client.post(
            "/v1/completions",
            content=json.dumps({"model": BASE, "prompt": "x"}),
            headers={"content-type": "application/x-www-form-urlencoded"},
        )
        assert answer.status_code == 400
        message = "expected Content-Type: application/json; got 'application/x-www-form-urlencoded'"
        assert error_of(answer)["message"] == message


def test_a_name_is_listed_once_however_patterns_spell_it(tmp_path: Path) -> None:
    world = World(tmp_path, keys=True)
    assert world.keys is not None
    world.put("Zoë-1")
    _, key = world.keys.add(prefixes=("Zoë*", "Zoe\u0308-*"))
    with world.running(), world.http(key) as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [BASE, "Zoë-1"]


def test_too_many(tmp_path: Path) -> None:
    world = World(tmp_path, max_texts=3)
    with world.running(), world.http() as client:
        world.engine.open.clear()
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(world.complete(client))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(world.engine.requests) == 3)
        for more in ({}, {"stream": True}):
            answer = world.complete(client, **more)
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert error_of(answer)["type"] == "rate_limit_error"
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        loop_free(world)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert world.complete(client, n=3).status_code == 200
        assert world.complete(client, n=4).status_code == 400
        # OpenAI's client comes back by itself
        world.engine.open.clear()
        waiting = [threading.Thread(target=lambda: world.complete(client)) for _ in range(3)]
        for thread in waiting:
            thread.start()
        until(lambda: len(world.engine.requests) == 9)
        threading.Timer(0.3, lambda: loop_free(world)).start()
        with openai.OpenAI(base_url=f"{world.url}/v1", api_key="x", max_retries=4) as theirs:
            assert theirs.completions.create(model=BASE, prompt="a").choices[0].text.startswith("- 2 ")
        for thread in waiting:
            thread.join()


def loop_free(world: World) -> None:
    loop = world.app.state.service._loop
    loop.call_soon_threadsafe(world.engine.open.set)


def test_limits_of_a_key() -> None:
    now = [1000.0]
    limits = Limits(10, clock=lambda: now[0])
    key = Key(id="a", sha256="", tokens_per_minute=60, concurrency=2)
    with limits.entered(key, 2, 10) as spend:
        with (
            pytest.raises(TooManyError, match="this key may have 2 texts under way; it has 2, and 1 more"),
            limits.entered(key, 1, 1),
        ):
            pass
        # another key has its own
        with (
            limits.entered(Key(id="b", sha256=""), 8, 10_000),
            pytest.raises(TooManyError, match="expected at most 10 texts"),
            limits.entered(Key(id="c", sha256=""), 1, 1),
        ):
            pass
        spend(80)
    assert limits.under_way == 0
    # to try again later would be of no use
    with (
        pytest.raises(SettingsError, match="this key may have 2 texts under way; 3 were asked for at once"),
        limits.entered(key, 3, 1),
    ):
        pass
    # nor does what was spent without a limit count once there is one
    with (
        limits.entered(Key(id="d", sha256=""), 1, 10_000),
        limits.entered(Key(id="d", sha256="", tokens_per_minute=60), 1, 0),
    ):
        pass
    with pytest.raises(TooManyError, match="60 tokens a minute") as caught, limits.entered(key, 1, 5):
        pass
    # 30 over, and 5 wanted: 35 s at one a second
    assert (caught.value.retry_after, caught.value.what) == (35, "tokens")
    now[0] += 34
    with pytest.raises(TooManyError), limits.entered(key, 1, 5):
        pass
    now[0] += 1
    with limits.entered(key, 1, 5):
        pass
    now[0] += 1000
    # more than a minute's are let in when there is a whole minute's
    with limits.entered(key, 1, 500):
        pass
    with pytest.raises(TooManyError) as caught, limits.entered(key, 1, 500):
        pass
    assert caught.value.retry_after == 60


def test_when_to_come_back_is_what_texts_have_taken() -> None:
    now = [0.0]
    limits = Limits(1, clock=lambda: now[0])

    def wait() -> int:
        with (
            limits.entered(Key(id="a", sha256=""), 1, 0),
            pytest.raises(TooManyError) as caught,
            limits.entered(Key(id="b", sha256=""), 1, 0),
        ):
            pass
        return caught.value.retry_after

    def take(seconds: float, times: int) -> None:
        for _ in range(times):
            with limits.entered(Key(id="a", sha256=""), 1, 0):
                now[0] += seconds

    assert wait() == 1
    take(17.0, 1)
    # an eighth of each is new
    assert 2 < wait() < 5
    take(17.0, 100)
    assert 15 <= wait() <= 17
    take(1000.0, 100)
    assert wait() == 60


def test_names_and_cards_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    names = ["n" * i for i in range(1, 8)]
    world.put(*names)
    looked, read = [], []
    newest, whole = world.store.newest, world.store.read
    monkeypatch.setattr(world.store, "newest", lambda name: looked.append(name) or newest(name))
    monkeypatch.setattr(world.store, "read", lambda version: read.append(version.name) or whole(version))
    catalog = Catalog(world.store, world.engine, 60.0)

    async def find(*names: str) -> None:
        for name in names:
            assert (await catalog.find(name)).version.name == name

    asyncio.run(find(names[0]))
    size = catalog._bytes
    monkeypatch.setattr("foreword.serve.catalog.POLL", 600.0)
    monkeypatch.setattr("foreword.serve.catalog.MAX_BYTES", 4 * size + size // 2)
    monkeypatch.setattr("foreword.serve.catalog.MAX_NAMES", 5)
    asyncio.run(find(*names[1:4], names[0]))
    assert read == names[:4]
    # the one that was used the longest ago makes room
    asyncio.run(find(names[4], names[0], names[1]))
    assert read == [*names[:5], names[1]]
    looked.clear()
    asyncio.run(find(names[6], names[5]))
    assert looked == [names[6], names[5]]
    assert len(catalog._newest) == len(catalog._contents) == 5
    assert len(catalog._entries) == 4
    assert catalog._bytes == sum(size for _, size in catalog._entries.values()) <= 4 * size + size // 2
    catalog.threads.close()


def test_changes_are_looked_for_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    world.put("alice")
    changes, failed = world.store.changes, []

    def fail_twice(since: Any) -> Any:
        if len(failed) < 2:
            failed.append(since)
            raise OSError("the network is down")
        return changes(since)

    monkeypatch.setattr("foreword.serve.catalog.POLL", 0.05)
    with world.running(), world.http() as client:
        assert world.complete(client, "alice").status_code == 200
        monkeypatch.setattr(world.store, "changes", fail_twice)
        Store(tmp_path / "store").delete("alice")
        until(lambda: world.app.state.service.catalog._entries == {})
    assert len(failed) == 2
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert said == ["cannot look at the store's changes"] * 2


def test_limits_over_http(tmp_path: Path) -> None:
    world = World(tmp_path, keys=True)
    assert world.keys is not None
    _, text = world.keys.add(tokens_per_minute=20)
    with world.running(), world.http(text) as client:
        assert world.complete(client, n=4).status_code == 200  # 4 tokens in, 12 out
        assert world.complete(client, n=4).status_code == 200
        answer = world.complete(client)
        assert (answer.status_code, error_of(answer)["code"]) == (429, "tokens_limit_exceeded")
        assert int(answer.headers["retry-after"]) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_who_hangs_up_frees_the_row(tmp_path: Path, stream: bool, held: bool) -> None:
    world = World(tmp_path, script=lambda request: ["word "] * 10_000_000)
    with world.running(), world.http() as client:
        if held:
            world.engine.open.clear()

        async def ask_and_leave() -> None:
            async with httpx.AsyncClient(base_url=world.url, timeout=30) as own:
                body = {"model": BASE, "prompt": "abc", "n": 2, "stream": stream, "max_tokens": 100_000_000}
                body["max_tokens"] = 120
                if not held:
                    world.engine.context = None
                    body["max_tokens"] = 100_000_000
                task = asyncio.create_task(own.post("/v1/completions", json=body))
                while len(world.engine.requests) < 2:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(ask_and_leave())
        until(lambda: world.engine.figures().running == 0)
        assert sorted(world.engine.closed) == sorted(request.id for request in world.engine.requests)
        until(lambda: world.app.state.service.limits.under_way == 0)
        loop_free(world)
        world.engine.script = lambda request: ["done"]
        assert world.complete(client).json()["choices"][0]["text"] == "done"
        until(lambda: figures(client)["foreword_abandoned_total", ()] == 1)


def figures(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = client.get("/metrics")
    # by which Prometheus knows how to read it
    assert re.match(r"text/plain; version=\d", answer.headers["content-type"])
    text = answer.text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_who_reads_no_further_frees_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.serve.completions.LAST_WORDS", 0.1)
    world = World(
        tmp_path, engine=FakeEngine(lambda request: ["word " * 40_000] * 1000, context=None), timeout=1, max_texts=2
    )
    body = json.dumps({"model": BASE, "prompt": "x", "stream": True, "max_tokens": 1000, "n": 2}).encode()
    with world.running(), world.http() as client, socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = httpx.URL(world.url)
        stalled.connect((url.host, url.port))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        stalled.sendall(head.encode() + body)
        limits = world.app.state.service.limits
        until(lambda: limits.under_way == 2)
        until(lambda: limits.under_way == 0)
        assert world.complete(client, max_tokens=2).status_code == 200
        until(lambda: figures(client)["foreword_abandoned_total", ()] == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_timeouts(tmp_path: Path, stream: bool) -> None:
    world = World(tmp_path, timeout=0.2)
    with world.running(), world.http() as client:
        world.engine.open.clear()
        answer = world.complete(client, stream=stream)
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
        assert len(world.engine.closed) == 1


def test_an_error_amid_a_stream(tmp_path: Path) -> None:
    def script(request: Request) -> Sequence[str]:
        if request.tokens[-1] % 2:
            raise RuntimeError("out of memory, said the engine of Secret's text")
        return ["fine"]

    world = World(tmp_path, script=script)
    with world.running(), world.http() as client:
        for stream in (False, True):
            answer = world.complete(client, prompt=[5], stream=stream)
            assert (answer.status_code, error_of(answer)["message"]) == (500, "the server failed; its log says why")
        assert world.complete(client, prompt=[4]).status_code == 200

    class Stuck(FakeEngine):
        async def generate(self, request: Request) -> Any:
            async for piece in super().generate(request):
                yield piece
                self.open.clear()

    # the first piece has to come in that time
    world = World(tmp_path / "stuck", engine=Stuck(), timeout=1.0)
    with world.running(), world.http() as client:
        answer = world.complete(client, stream=True)
        assert answer.status_code == 200
        *_, last = answer.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        world.engine.open = asyncio.Event()
        with openai.OpenAI(base_url=f"{world.url}/v1", api_key="x", max_retries=0) as theirs:
            loop = world.app.state.service._loop
            loop.call_soon_threadsafe(world.engine.open.set)
            with pytest.raises(openai.APIError, match="longer than this server allows"):
                list(theirs.completions.create(model=BASE, prompt="a", stream=True))


def test_before_the_engine_has_started(tmp_path: Path) -> None:
    """The process is well, and wants no requests."""
    world = World(tmp_path)
    world.put("a")
    go_on, start = asyncio.Event(), world.engine.start

    async def slowly() -> None:
        await go_on.wait()
        await start()

    world.engine.start = slowly  # type: ignore[method-assign]
    with served(world.app, ready=False) as world.url, world.http() as client:
        assert client.get("/health").status_code == 200
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
        for model in (BASE, "a"):
            for stream in (False, True):
                answer = world.complete(client, model, stream=stream)
                assert (answer.status_code, error_of(answer)["code"]) == (503, "not_ready")
                assert int(answer.headers["retry-after"]) >= 1
        world.app.state.service._loop.call_soon_threadsafe(go_on.set)
        until(lambda: client.get("/ready").status_code == 200)
        assert world.complete(client, "a").status_code == 200


def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def refuse() -> None:
        raise SettingsError("vLLM did not start")

    world.engine.start = refuse  # type: ignore[method-assign]
    with served(world.app, ready=False) as url:
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        answer = httpx.get(f"{url}/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "the engine did not start; the log says why"})
    # as foreword serve, which ends, and says why
    with pytest.raises(SettingsError, match="vLLM did not start"):
        run(World(tmp_path / "another", engine=world.engine).app, port=0)


def test_stopping_lets_texts_end(tmp_path: Path) -> None:
    world = World(tmp_path, grace=20)
    answers: list[httpx.Response] = []
    with world.running(), world.http() as client, world.http() as other:
        world.engine.open.clear()
        threads = [
            threading.Thread(target=lambda s=s: answers.append(world.complete(client, stream=s))) for s in (False, True)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(world.engine.requests) == 2)
        world.app.state.service.stop_soon()
        until(lambda: other.get("/ready").status_code == 503)
        assert other.get("/health").status_code == 200
        answer = world.complete(other)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "not_ready")
        loop_free(world)
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]


def test_stopping_cuts_off_what_takes_too_long(tmp_path: Path) -> None:
    world = World(tmp_path, grace=0.1)
    answers: list[httpx.Response] = []
    with world.running(), world.http() as client:
        world.engine.open.clear()
        thread = threading.Thread(target=lambda: answers.append(world.complete(client)))
        thread.start()
        until(lambda: len(world.engine.requests) == 1)
        world.app.state.service.stop_soon()
        thread.join(20)
        assert (answers[0].status_code, error_of(answers[0])["code"]) == (503, "not_ready")


# figures and logs


def test_figures_of_the_engine_are_told_under_their_own_names(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("running", "waiting", "resident_prefixes", "resident_bytes", "budget_bytes", "hits", "loads", "evictions")
    own = dict(zip(names, range(11, 19), strict=True))
    monkeypatch.setattr(world.engine, "figures", lambda: Figures(**own))
    with world.http() as client:
        told = figures(client)
    for name in ("running", "waiting", "resident_prefixes", "resident_bytes"):
        assert told[f"foreword_engine_{name}", ()] == own[name]
    assert told["foreword_engine_resident_budget_bytes", ()] == own["budget_bytes"]
    for name in ("hits", "loads", "evictions"):
        assert told[f"foreword_engine_prefix_{name}_total", ()] == own[name]


def test_keys_that_are_added_at_once_all_stay(tmp_path: Path) -> None:
    def add(n: int) -> str:
        return KeyFile(tmp_path / "keys.json").add(label=f"{n}")[0].id

    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(add, range(24)))
    assert {key.id for key in KeyFile(tmp_path / "keys.json").known()} == set(ids)
    assert len(set(ids)) == 24


def test_metrics(world: World) -> None:
    world.put("a", "b")
    with world.http() as client:
        for model in ("a", "a", BASE, "nobody"):
            world.complete(client, model, n=2)
        client.get("/nowhere/" + "x" * 50)
        client.get("/v1/models/" + "y" * 50)
        route = ("route", "/v1/completions")
        # requests are counted once their answers are out
        until(lambda: figures(client).get(("foreword_request_seconds_count", (route,))) == 4)
        until(lambda: ("foreword_request_seconds_count", (("route", "/v1/models/{model:path}"),)) in figures(client))
        told = figures(client)
        assert told["foreword_requests_total", (route, ("status", "200"))] == 3
        assert told["foreword_requests_total", (route, ("status", "404"))] == 1
        assert told["foreword_requests_total", (("route", "none"), ("status", "404"))] == 1
        assert told["foreword_requests_total", (("route", "/v1/models/{model:path}"), ("status", "404"))] == 1
        assert told["foreword_request_seconds_count", (route,)] == 4
        assert told["foreword_output_tokens_total", ()] == 3 * 2 * 3
        assert told["foreword_input_tokens_total", ()] == 5 + 5 + 4
        assert told["foreword_time_to_first_token_seconds_count", ()] == 6
        assert told["foreword_texts_under_way", ()] == 0
        for name in ("running", "waiting", "resident_prefixes", "resident_bytes", "resident_budget_bytes"):
            assert told[f"foreword_engine_{name}", ()] == 0
        for name in ("prefix_hits", "prefix_loads", "prefix_evictions"):
            assert told[f"foreword_engine_{name}_total", ()] == 0
        # nothing that a client chooses is a label
        assert not re.search("xxx|yyy|nobody", client.get("/metrics").text)


def test_logs(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world.put("a")
    with world.http() as client:
        answer = world.complete(client, "a", prompt="private words")
        id = answer.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", id)
        # an engine's log tells which request its text is of
        assert re.fullmatch(f"{id}-[0-9a-f]{{12}}", world.engine.requests[-1].id)
        for given, kept in [("abc-1", True), ("a" * 65, False), ('a"b', False)]:
            answer = client.get("/v1/models", headers={"x-request-id": given})
            assert (answer.headers["x-request-id"] == given) is kept

    def told() -> list[logging.LogRecord]:
        return [record for record in caplog.records if hasattr(record, "facts")]

    # a line is written once its answer is out, which the client may be quicker to read
    until(lambda: len(told()) == 4)
    lines = [json.loads(JsonFormatter().format(record)) for record in told()]
    assert [line["route"] for line in lines] == ["/v1/completions", *["/v1/models"] * 3]
    first = lines[0]
    assert (first["request"], first["method"], first["status"], first["message"]) == (id, "POST", 200, "request")
    assert first["seconds"] > 0
    assert first["model"] == "a"
    assert first["version"] == world.store.newest("a").sha256[:12]
    assert "private" not in caplog.text


def test_an_exception_s_message_is_not_logged() -> None:
    try:
        raise ValueError("somebody's text")
    except ValueError:
        record = logging.getLogger("foreword").makeRecord(
            "foreword", 40, "f", 1, "it failed", (), __import__("sys").exc_info()
        )
    line = json.loads(JsonFormatter().format(record))
    assert line["exception"] == "ValueError"
    assert "test_serve_http" in line["at"][-1]
    assert "somebody" not in json.dumps(line)


def test_large_requests_are_not_read(world: World) -> None:
    with world.http() as client:
        answer = client.post(
            "/v1/completions", content=b" " * ((16 << 20) + 1), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
        for content in (b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": 3}', b"1" * 5000, b"[" * 100_000):
            answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400, content[:20]
            error_of(answer)
        for path in ("/", "/v1", "/v1/embeddings", "/v1/completions/x"):
            assert error_of(client.get(path))["type"] == "invalid_request_error"
        assert client.get("/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"prompt": {"a": 1}}, "prompt", "expected a text, a list of texts, token ids or lists of token ids"),
        ({"prompt": [{"type": "text", "text": "x"}]}, "prompt", "expected a text, a list of texts, token ids or"),
        ({"prompt": []}, "prompt", "List should have at least 1 item"),
        ({"prompt": ["a", 1]}, "prompt.1", "Input should be a valid string"),
        ({"prompt": [1.5]}, "prompt.0", "Input should be a valid integer"),
        ({"prompt": [[1], ["b"]]}, "prompt.1.0", "Input should be a valid integer"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "expected a text or text parts"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "expected a text or text parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "Field required",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_field_of_several_kinds(
    world: World, more: dict[str, Any], param: str, message: str
) -> None:
    path = "/v1/chat/completions" if "messages" in more else "/v1/completions"
    with world.http() as client:
        error = error_of(client.post(path, json={"model": BASE, **more}))
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: {message}")


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": [-1] * 1000},
        {"prompt": [[-1] * 1000] * 100},
        {"prompt": [1.5, *["x"] * 1000]},
        {"stop": [""] * 1000},
        {"record": {str(i): i for i in range(1000)}},
        {"record": {str(i): [] for i in range(100)}},
        {"logit_bias": {str(i): "x" for i in range(1000)}},
        {str(i): i for i in range(1000)},
        {"messages": [{"role": "user", "content": [1] * 1000}] * 10},
        {"messages": [{"role": "user", "content": [{"type": "text", **{str(i): i for i in range(1000)}}]}] * 10},
        {"messages": [{"role": "x"}] * 1000},
    ],
    ids=lambda more: f"{min(more)} {str(more)[:30]}",
)
def test_of_many_errors_few_are_looked_for(more: dict[str, Any]) -> None:
    """Or a body of some megabytes costs gigabytes, and the server's only loop seconds."""
    kind = ChatRequest if "messages" in more else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": BASE, **({"prompt": "x"} if kind is CompletionRequest else {}), **more})
    assert caught.value.error_count() <= 8


def test_what_cannot_fit_is_not_tokenized(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte takes a tokenizer a second, and hundreds of megabytes."""
    world.put("told", template="{name}: {input}")
    world.put("cutting", template="{messages}{input}\n", max_input_tokens=20)
    longest = max(map(len, world.base.tokenizer.get_vocab()))
    with world.http() as client:
        assert world.complete(client, prompt="x" * (131 * longest)).status_code == 400
        monkeypatch.setattr("foreword.serve.service.frame", None)
        for body in (
            {"prompt": "x" * (131 * longest + 1)},
            {"model": "told", "prompt": "x", "record": {"name": "y" * 131 * longest}},
            {"messages": [{"role": "user", "content": "x" * 131}] * longest + [{"role": "user", "content": "x"}]},
        ):
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            answer = client.post(path, json={"model": BASE, **body})
            assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
            assert error_of(answer)["message"].startswith(f"expected at most {131 * longest} characters")
        monkeypatch.undo()
        # what the framing cuts, or does not use, does not count; and columns may be called what they like
        for body in (
            {"model": "cutting", "prompt": "x" * 3000, "record": {"messages": "ab"}},
            {"model": "told", "prompt": "x", "record": {"name": "y", "unused": "y" * 3000, "messages": 5}},
        ):
            answer = world.complete(client, **body)
            assert answer.status_code == 200, answer.text
        assert len(world.engine.requests[-2].tokens) == 20


def test_an_engine_that_leaves_a_text_without_an_end(tmp_path: Path) -> None:
    world = World(tmp_path, script=lambda request: [])
    with world.running(), world.http() as client:
        answer = world.complete(client)
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")


def test_an_engine_that_died(world: World) -> None:
    with world.http() as client:
        world.engine.problem = lambda: "the engine's thread has ended"  # type: ignore[method-assign]
        for path in ("/health", "/ready"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "the engine's thread has ended"})


def test_a_folder_s_path_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("llama")
    folder = tmp_path / "my-base"
    folder.mkdir()
    base = foreword.Base(base.model, base.tokenizer, str(folder))
    store = Store(tmp_path / "store", create=True)
    with served(create_app(base, store, engine=FakeEngine())) as url:
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "my-base"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".", "~/my-base", "../my-base/"):
        base = foreword.Base(base.model, base.tokenizer, name)
        assert create_app(base, store, engine=FakeEngine()).state.service.base_name == "my-base"


def test_the_document_of_the_api_says_what_comes(world: World) -> None:
    with world.http() as client:
        document = client.get("/openapi.json").json()
        assert client.get("/ready").json().keys() == {"status"}
    answers = {status for path in document["paths"].values() for one in path.values() for status in one["responses"]}
    assert answers == {"200", "201", "503", "4XX", "5XX"}
    stop = document["components"]["schemas"]["CompletionRequest"]["properties"]["stop"]
    assert {kind.get("type") for kind in stop["anyOf"][0].get("anyOf", stop["anyOf"])} >= {"string", "array"}


def test_whole_numbers_are_integers_however_they_are_written() -> None:
    given = CompletionRequest.model_validate(
        {"model": BASE, "prompt": "x", "max_tokens": 7.0, "temperature": 1, "seed": 1e3}
    )
    assert (given.max_tokens, given.temperature, given.seed) == (7, 1.0, 1000)
    for value in (7.5, "7", True, math.inf, math.nan, 1e300):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({"model": BASE, "prompt": "x", "max_tokens": value})
