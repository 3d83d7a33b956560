"""An engine that computes nothing: for tests of whatever stands before an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from typing import Any

from foreword.serve.engine import Engine, EngineStoppedError, Figures, Finish, Piece, Request, TokenLogprob, all_ended

__all__ = ["FakeEngine"]


def _echo(request: Request) -> Sequence[str]:
    """Its prefix's name, how many tokens x has, and what they sum to."""
    name = "-" if request.prefix is None else request.prefix.name
    return [name, f" {len(request.tokens)}", f" {sum(request.tokens)}"]


class FakeEngine(Engine):
    """Says the words of `script(request)`, a piece and a token each; token ids count from 0.

    Args:
        script: the words to say, which may raise instead. Default: the prefix's name, the number of x's tokens, their sum.
        context: as of an engine.

    Attributes:
        requests: all that came, in order.
        closed: ids of those that were left before their end.
        forgotten: contents that were to be forgotten.
        open: an event: while it is cleared, no request gets a piece. Set at first.
    """

    name = "fake"

    def __init__(self, script: Callable[[Request], Sequence[str]] = _echo, *, context: int | None = 131):
        self.script = script
        self.context = context
        self.requests: list[Request] = []
        self.closed: list[str] = []
        self.forgotten: set[str] = set()
        self.open = asyncio.Event()
        self.open.set()
        self._running: dict[str, asyncio.Event] = {}
        self._ready = self._cut = False

    async def start(self) -> None:
        self._ready = True

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        if not self._ready:
            raise EngineStoppedError("the engine is not running")
        self.requests.append(request)
        words = self.script(request)
        self._running[request.id] = asyncio.Event()
        done = False
        try:
            for i, word in enumerate(words[: request.sampling.max_tokens]):
                await self._turn(request)
                last = i + 1 == min(len(words), request.sampling.max_tokens)
                done = last
                yield Piece(text=word, tokens=[i], finish=self._finish(words, i) if last else None, **_told(request, i))
        finally:
            if not done:
                self.closed.append(request.id)
            self._running.pop(request.id).set()

    async def _turn(self, request: Request) -> None:
        """Let others run, and wait while the engine is held."""
        await asyncio.sleep(0)
        while not (self.open.is_set() or self._cut):
            await asyncio.sleep(0.001)
        if self._cut:
            raise EngineStoppedError(f"the engine was stopped before the end of {request.id}")

    @staticmethod
    def _finish(words: Sequence[str], i: int) -> Finish:
        return "stop" if i + 1 == len(words) else "length"

    async def forget(self, sha256s: Collection[str]) -> None:
        self.forgotten.update(sha256s)

    def figures(self) -> Figures:
        return Figures(running=len(self._running))

    async def stop(self, grace: float) -> None:
        self._ready = False
        if not await all_ended(self._running.values(), grace):
            self._cut = True


def _told(request: Request, token: int) -> dict[str, Any]:
    """Log-probabilities that count down from -0.5 by 0.25, where the request asks for them."""
    count = request.sampling.logprobs
    if count is None:
        return {}
    top = tuple((token + rank, -0.5 - rank / 4) for rank in range(count))
    return {"logprobs": [TokenLogprob(token=token, logprob=-0.5, top=top)]}
