"""Serving: thousands of prefixes over one base, to clients that speak OpenAI's protocol.

engine.py     the small interface between the server and what computes; requests, pieces, figures
fake.py       an engine for tests, which says what it is told to
"""

from __future__ import annotations

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

__all__ = [
    "Engine",
    "EngineStoppedError",
    "FakeEngine",
    "Figures",
    "Finish",
    "Piece",
    "Request",
    "Sampling",
    "TokenLogprob",
]
