"""What the tests of the server share: tiny bases, and prefixes of them."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from test_generation import word_tokenizer
from tiny import EOS, random_prefix, tiny_model, tiny_tokenizer

from foreword.bases import Base
from foreword.prefix import Card, Framing, Prefix

ENGINES = (
    "local",
    pytest.param("vllm", marks=(pytest.mark.slow, pytest.mark.vllm, pytest.mark.filterwarnings("default"))),
)
"""What a test of the whole server is tried with. vLLM starts processes that are killed at the end, and warns of much."""
ENDS = [EOS, *range(0, 256, 9)]
"""Tokens that end a text, so that random models end some of theirs."""


def make_base(family: str, *, dtype: torch.dtype = torch.float32, **config: Any) -> Base:
    """A tiny base of its own, which may be attached to."""
    model = tiny_model(family, dtype=dtype, **config)
    model.generation_config.eos_token_id = list(ENDS)
    model.generation_config.forced_eos_token_id = None
    return Base(model, tiny_tokenizer(family), f"tiny-{family}")


@functools.cache
def reference_base(family: str) -> Base:
    """One for all references, which leave it as it was."""
    return make_base(family)


def save(base: Base, folder: Path) -> str:
    """Put a base into a folder; returns its name."""
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


@functools.cache
def words_base(family: str, **config: Any) -> Base:
    """One whose texts show their tokens, w5 w7; only the end token ends them."""
    base = make_base(family, **config)
    base.model.generation_config.eos_token_id = EOS
    return Base(base.model, word_tokenizer(), base.name)


def copy_of(base: Base) -> Base:
    return Base(copy.deepcopy(base.model), base.tokenizer, base.name)


def prefix_for(base: Base, length: int, seed: int = 0, **framing: Any) -> Prefix:
    prefix = random_prefix(base.model, length, seed=1000 * length + seed)
    return Prefix(prefix.sections, Card(base=base.name, fingerprint=base.fingerprint, framing=Framing(**framing)))


CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def chat_base(family: str = "llama", **config: Any) -> Base:
    """One whose tokenizer has a chat template; made anew, so that it may be attached to."""
    base = make_base(family, **config)
    base.tokenizer.chat_template = CHAT_TEMPLATE
    return base


@contextmanager
def served(app: FastAPI, *, ready: bool = True) -> Iterator[str]:
    """The application on a socket of this machine, in a thread of its own; yields its URL, by default once it is ready."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    service = app.state.service

    def started() -> bool:
        assert thread.is_alive(), "the server did not start"
        assert not ready or service.failure is None, service.failure
        return server.started and not (ready and service.not_ready)

    try:
        until(started, 300)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
