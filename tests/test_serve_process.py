"""`foreword serve` as a process: started, stopped, killed and started again; and the commands for keys."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from serving import ENGINES, make_base, prefix_for, save, until
from test_cli import Ran
from tiny import CONTEXT
from vllm_harness import BLOCK, SIZES

from foreword.bases import Base
from foreword.cli import main
from foreword.generation import GenerateSettings, generate
from foreword.serve import KeyFile
from foreword.store import Store

Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["foreword", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def test_keys(run: Run, tmp_path: Path) -> None:
    ran = run("keys", "add", "k.json", "--prefix", "team/*", "--prefix", "a[b]", "--label", "Zoë", "--concurrency", 3)
    assert ran.code == 0
    text = ran.out.strip()
    assert re.fullmatch(r"fw-[0-9a-f]{8}-[\w-]{43}", text)
    key = KeyFile(tmp_path / "k.json").find(text)
    assert key is not None
    assert (key.prefixes, key.label, key.concurrency, key.admin) == (("team/*", "a[b]"), "Zoë", 3, False)
    assert ran.err == f"{key.id} may use: team/*, a[b]\n"
    ran = run("keys", "add", "k.json", "--admin", "--tokens-per-minute", 5000)
    assert (ran.code, ran.err.partition(" ")[2]) == (0, "may use: all, as an admin\n")
    assert run("keys", "add", "base.json").err.endswith(" may use: the base alone\n")
    lines = run("keys", "ls", "k.json").out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(key.id)
    assert lines[0].endswith("Zoë  team/*, a[b]  3 at once")
    assert lines[1].endswith("all, as an admin  5,000 tokens/min")
    facts = [json.loads(line) for line in run("keys", "ls", "k.json", "--json").out.splitlines()]
    assert facts[0] == {
        "id": key.id, "label": "Zoë", "prefixes": ["team/*", "a[b]"], "admin": False, "tokens_per_minute": None,
        "concurrency": 3, "created": key.created,
    }  # fmt: skip
    assert key.sha256 not in json.dumps(facts)
    assert run("keys", "rm", "k.json", key.id).out == f"{key.id}  Zoë  removed\n"
    assert KeyFile(tmp_path / "k.json").find(text) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "ls", "none.json"], "no file of keys at none.json"),
        (["keys", "add", "new.json", "--label", "\udcff"], r"expected Unicode text; got a lone surrogate, '\udcff'"),
        (["keys", "rm", "k.json", "zz"], "no key 'zz' in k.json: see foreword keys ls"),
        (["keys", "ls", "bad.json"], "expected a file of API keys at bad.json"),
        (["serve", "--base", "none", "--prefixes", "S", "--host", "0.0.0.0"], "expected API keys where others can reach the server, at 0.0.0.0"),
        (["serve", "--base", "none", "--prefixes", "S", "--keys", "none.json"], "expected API keys in none.json; there are none"),
        (["serve", "--base", "none", "--prefixes", "S", "--keys", "bad.json"], "expected a file of API keys at bad.json"),
        (["serve", "--base", "none", "--prefixes", "nowhere"], "expected a store at nowhere; there is none"),
        (["serve", "--base", "./none.gguf", "--prefixes", "S"], "no model at './none.gguf'"),
        (["serve", "--base", "none", "--prefixes", "S", "--engine", "x"], "expected an engine of auto, local, vllm; got 'x'"),
        (["serve", "--base", "none", "--prefixes", "S", "--engine", "local", "--vllm-options", '{"a": 1}'], "vLLM's options and ranks mean nothing to the engine local"),
        (["serve", "--base", "none", "--prefixes", "S", "--engine", "local", "--ranks", "2"], "vLLM's options and ranks mean nothing to the engine local"),
        (["serve", "--base", "none", "--prefixes", "S", "--vllm-options", "[1]"], "expected --vllm-options as a JSON object; got '[1]'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("foreword.serve.logs.log_as_json", lambda: None)
    Store(tmp_path / "S", create=True)
    KeyFile(tmp_path / "k.json").add(admin=True)
    (tmp_path / "bad.json").write_text("{")
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {message}")
    assert ran.err.count("\n") == 1


def test_a_port_that_is_in_use(run: Run, tmp_path: Path) -> None:
    Store(tmp_path / "S", create=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run("serve", "--base", "none", "--prefixes", "S", "--port", port)
    message = f"error: cannot listen on port {port} of '127.0.0.1' (Address already in use): give another with --port\n"
    assert (ran.code, ran.err) == (2, message)
    # of TEST-NET-1, which no machine has
    ran = run("serve", "--base", "none", "--prefixes", "S", "--host", "192.0.2.1", "--keys", "K")
    assert ran.code == 2
    assert ran.err.endswith("give another with --host\n")


# what takes a process


class Server:
    """A process of `foreword serve`, and its log."""

    def __init__(self, folder: Path, engine: str, *options: Any, ready: bool = True):
        command = [sys.executable, "-m", "foreword", "serve", "--base", folder / "base", "--prefixes", folder / "store"]
        command += ["--engine", engine, "--dtype", "float32", "--device", "cpu", "--port", "0", *options]
        if engine == "vllm":
            pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm, then make test-vllm")
            command += [
                "--cache-memory",
                "64",
                "--vllm-options",
                json.dumps({"enforce_eager": True, "block_size": BLOCK}),
            ]
        self.process = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[dict[str, Any]] = []
        self.other: list[str] = []
        self.url = ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        until(lambda: bool(self.url) or self.process.poll() is not None, 300)
        assert self.process.poll() is None, (self.lines, self.other)
        if ready:
            until(lambda: httpx.get(f"{self.url}/ready").status_code == 200 or self.process.poll() is not None, 300)

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                # what others print past all loggers
                self.other.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]

    def stop(self, how: int) -> int:
        self.process.send_signal(how)
        return self.ended()

    def ended(self, children: Sequence[psutil.Process] = ()) -> int:
        """Wait for its end, and that of its children. Returns its exit code."""
        code = self.process.wait(60)
        assert psutil.wait_procs(children, 60)[1] == []
        self.thread.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextmanager
def server(folder: Path, engine: str, *options: Any, **more: Any) -> Iterator[Server]:
    started = Server(folder, engine, *options, **more)
    try:
        yield started
    finally:
        children = started.children if started.process.poll() is None else []
        started.process.kill()
        started.ended(children)


@pytest.fixture
def saved(tmp_path: Path) -> Base:
    """A base in a folder, and an empty store beside it."""
    base = make_base("llama", **SIZES["llama"] | {"max_position_embeddings": CONTEXT})
    save(base, tmp_path / "base")
    Store(tmp_path / "store", create=True)
    return base


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_started_again(saved: Base, tmp_path: Path, engine: str) -> None:
    """kill -9 amid uploads and a stream: the store is whole, what was confirmed is there, and clients get an error."""
    data = [prefix_for(saved, 5, seed=seed).to_bytes(torch.float32) for seed in range(20)]
    confirmed: dict[str, str] = {}
    errors: list[Exception] = []

    def upload(url: str, thread: int) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            for i in range(1000):
                try:
                    name = f"{thread}-{i}"
                    answer = client.put(f"/v1/prefixes/{name}", content=data[i % 20])
                    confirmed[name] = answer.json()["sha256"]
                except httpx.HTTPError as error:
                    errors.append(error)
                    return

    with server(tmp_path, engine) as first:
        threads = [threading.Thread(target=upload, args=(first.url, i)) for i in range(3)]
        for thread in threads:
            thread.start()
        with openai.OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="base", prompt="a", max_tokens=120, n=20, seed=1, stream=True)
            next(iter(stream))
            until(lambda: len(confirmed) >= 40, 60)
            children = first.children
            assert (engine == "vllm") == any("EngineCore" in child.name() for child in children)
            first.process.kill()

            def go_on() -> None:
                for _ in range(100_000):
                    list(stream)
                    client.completions.create(model="base", prompt="a")

            with pytest.raises((openai.APIError, httpx.HTTPError)):
                go_on()
        for thread in threads:
            thread.join(30)
        assert len(errors) == 3
        # nobody is left behind, with a base in memory
        first.ended(children)
    store = Store(tmp_path / "store")
    problems = [problem for problem in store.verify() if "cut off" not in problem.what]
    assert problems == []
    for name, sha256 in confirmed.items():
        assert store.newest(name).sha256 == sha256
    with server(tmp_path, engine) as second, openai.OpenAI(base_url=f"{second.url}/v1", api_key="none") as client:
        names = {model.id for model in client.models.list().data}
        assert names >= {"base", *confirmed}
        name = max(confirmed)
        answer = client.completions.create(model=name, prompt="abc", max_tokens=9, temperature=0)
        expected = generate(saved, ["abc"], [store.get(name)], settings=GenerateSettings(max_new_tokens=9))
        assert [answer.choices[0].text] == expected
        if engine == "vllm":
            dies_with_its_engine(second)


def dies_with_its_engine(server: Server) -> None:
    """Not by itself: it says so, to clients and to whoever looks after it."""
    assert httpx.get(f"{server.url}/health").status_code == 200
    children = server.children
    (core,) = (child for child in children if "EngineCore" in child.name())
    core.kill()
    until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 30)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="vLLM has ended; see its log") as caught:
            client.completions.create(model="base", prompt="a")
        assert caught.value.status_code == 503
    server.process.send_signal(signal.SIGTERM)
    assert server.ended(children) in (0, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_by_a_signal(saved: Base, tmp_path: Path, engine: str) -> None:
    """Texts under way come to their end, and no process stays; children get what a terminal's Ctrl-C sends to them."""
    _, text = KeyFile(tmp_path / "keys.json").add(admin=True)
    # keys are asked for, so another address than loopback is allowed
    options = ("--keys", tmp_path / "keys.json", "--host", "0.0.0.0", "--grace", "30")
    with server(tmp_path, engine, *options) as started:
        url = started.url.replace("0.0.0.0", "127.0.0.1")
        children = started.children
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key=text, max_retries=0) as client:
            stream = client.completions.create(model="base", prompt="a", max_tokens=120, n=64, seed=1, stream=True)
            iterator = iter(stream)
            first = next(iterator)
            for child in children:
                child.send_signal(signal.SIGINT)
            started.process.send_signal(signal.SIGTERM)
            chunks = [first, *iterator]
            finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
            assert sorted(finished) == list(range(64))
        assert started.ended(children) in (0, -signal.SIGTERM)
        (line,) = (line for line in started.lines if line.get("route") == "/v1/completions")
        assert (line["status"], line["key"]) == (200, text.split("-")[1])
        assert text not in json.dumps(started.lines)
        assert all({"time", "level", "logger", "message"} <= set(line) for line in started.lines)
        assert started.other == [] or engine == "vllm", "every line is JSON"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_before_it_is_ready(saved: Base, tmp_path: Path, engine: str) -> None:
    with server(tmp_path, engine, ready=False) as started:
        assert httpx.get(f"{started.url}/health").status_code == 200
        if engine == "vllm":
            answer = httpx.get(f"{started.url}/ready")
            assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
            until(lambda: any("EngineCore" in child.name() for child in started.children), 120)
        children = started.children
        started.process.send_signal(signal.SIGTERM)
        assert started.ended(children) in (0, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_what_vllm_cannot_serve_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm, then make test-vllm")
    monkeypatch.setattr("foreword.serve.logs.log_as_json", lambda: None)
    save(make_base("bart"), tmp_path / "base")
    Store(tmp_path / "S", create=True)
    ran = run("serve", "--base", "./base", "--prefixes", "S", "--engine", "vllm", "--port", 0)
    assert ran.code == 2
    # above it stands how far loading is
    *_, last = ran.err.splitlines()
    assert last == "error: vLLM serves decoder-only bases; './base' has an encoder: use the local engine"
