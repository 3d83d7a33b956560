"""Serving: thousands of prefixes over one base, to clients that speak OpenAI's protocol.

http.py         create_app: the application and its routes
completions.py  /v1/completions and /v1/chat/completions
prefixes.py     /v1/models, and /v1/prefixes for admins
schemas.py      requests and answers, as OpenAI's API has them
problems.py     errors, as OpenAI's API has them
service.py      behind the routes: who asks, which prefix, how x is framed, the texts as they come
catalog.py      what names mean now; an eye on the store's changes
access.py       API keys, and what each may use
limits.py       how much is let in at once
metrics.py      figures for Prometheus
logs.py         logs, and an id for every request
server.py       the process on a socket
choose.py       which engine serves a base
engine.py       the small interface between the server and what computes
local.py        an engine on transformers; its thread lets rows join and leave
runner.py       the base at work on rows that come and go
cache.py        keys and values of those rows
slots.py        their prefixes side by side
residents.py    prefixes in memory, within a budget
waiting.py      threads that wait for the store, and are left where it hangs
vllm.py         an engine on vLLM
connector.py    within vLLM's processes: prefixes from the store into its cache
placeholders.py token ids that stand for a prefix there
fake.py         an engine for tests, which says what it is told to
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreword.serve.access import Key, KeyFile
    from foreword.serve.choose import choose_engine
    from foreword.serve.engine import (
        Engine,
        EngineStoppedError,
        Figures,
        Finish,
        Piece,
        Request,
        Sampling,
        TokenLogprob,
    )
    from foreword.serve.fake import FakeEngine
    from foreword.serve.http import create_app
    from foreword.serve.local import LocalEngine
    from foreword.serve.server import run
    from foreword.serve.service import Settings

__all__ = [
    "Engine",
    "EngineStoppedError",
    "FakeEngine",
    "Figures",
    "Finish",
    "Key",
    "KeyFile",
    "LocalEngine",
    "Piece",
    "Request",
    "Sampling",
    "Settings",
    "TokenLogprob",
    "choose_engine",
    "create_app",
    "run",
]

_HOMES = {
    "access": ("Key", "KeyFile"),
    "choose": ("choose_engine",),
    "engine": ("Engine", "EngineStoppedError", "Figures", "Finish", "Piece", "Request", "Sampling", "TokenLogprob"),
    "fake": ("FakeEngine",),
    "http": ("create_app",),
    "local": ("LocalEngine",),
    "server": ("run",),
    "service": ("Settings",),
}


def __getattr__(name: str) -> Any:
    # engines need no web framework, and the command line neither until it serves
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"foreword.serve.{home}"), name)
    raise AttributeError(f"module 'foreword.serve' has no attribute {name!r}")
