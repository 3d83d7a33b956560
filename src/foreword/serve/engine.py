"""What stands between the server and what computes: one small interface, two engines, and a fake for tests.

A request is one text. The server has framed x, chosen the prefix's version and counted what the base's context leaves;
an engine does nothing but continue x, after that version and no other, whatever happens to its name meanwhile.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from foreword.errors import ForewordError, TooLongError
from foreword.store import Version

__all__ = [
    "Engine",
    "EngineStoppedError",
    "Figures",
    "Finish",
    "Piece",
    "Request",
    "Sampling",
    "TokenLogprob",
    "all_ended",
]

Finish = Literal["stop", "length"]
"""Why a text ended: with an end token or before a stop string, or because its tokens were used up."""


class EngineStoppedError(ForewordError):
    """The engine takes no more requests, or was stopped before this one's end."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one text are chosen. Ranges are the server's to check.

    Args:
        max_tokens: most tokens of y, its end token included.
        temperature: 0 for the most likely token, above 0 to sample.
        top_p: sample among the fewest most likely tokens that have this much probability together.
        seed: the same seed gives the same text. None: any.
        stop: strings before which the text ends.
        logprobs: None, or how many of the most likely tokens are told at each place, beside the one chosen; 0 or more.
            Log-probabilities are the model's own: of temperature 1, before top_p.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to write.

    Args:
        id: of the request, in logs; no two under way have the same.
        tokens: x, framed: token ids, at least one.
        prefix: the version that stands before x, by its content's hash; None for the bare base.
        sampling: see `Sampling`.
    """

    id: str
    tokens: tuple[int, ...]
    prefix: Version | None
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """A token and its log-probability, and the most likely tokens at its place with theirs, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What has come since the piece before.

    Args:
        text: of y; the pieces joined are the whole text. Whole characters only, nothing that a stop string could still
            take back, no special tokens; so it may be empty though tokens came.
        tokens: ids that came; an end token that ended the text counts and is the last one.
        logprobs: one for each of `tokens` where the request asked for them; else empty.
        finish: on the last piece alone; None on all others.
    """

    text: str
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """An engine's state and counts, for /metrics.

    Args:
        running: requests that are being computed.
        waiting: requests that wait for a row, or for their prefix.
        resident_prefixes: prefixes in memory.
        resident_bytes: what they take.
        budget_bytes: the most they may take.
        hits: requests whose prefix was in memory, since the start.
        loads: prefixes read from the store, since the start.
        evictions: prefixes that made room for others, since the start.
        more: an engine's own figures, by name.
    """

    running: int = 0
    waiting: int = 0
    resident_prefixes: int = 0
    resident_bytes: int = 0
    budget_bytes: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    more: dict[str, float] = field(default_factory=dict)


async def all_ended(under_way: Iterable[asyncio.Event], seconds: float) -> bool:
    """Whether all these ends come within so many seconds, which is waited for."""
    try:
        async with asyncio.timeout(seconds):
            for ended in list(under_way):
                await ended.wait()
    except TimeoutError:
        return False
    return True


class Engine(ABC):
    """Continues requests, many at a time. All methods are called on one event loop, which none of them may block.

    Attributes:
        name: `local`, `vllm` or `fake`.
        context: the most positions of a request, virtual tokens included; None where there is no limit.
        is_encoder_decoder: whether x and y have the context for themselves, and virtual tokens none of it.
    """

    name: str
    context: int | None
    is_encoder_decoder: bool = False

    def room(self, x: int, length: int) -> int | None:
        """The most tokens of y that fit the context after x tokens of x and `length` virtual ones; None for no limit.

        Raises:
            TooLongError: not even one does.
        """
        if self.context is None:
            return None
        taken = 0 if self.is_encoder_decoder else length + x
        if taken >= self.context or x > self.context:
            what = "" if self.is_encoder_decoder else f", {length} virtual tokens, and at least one token of the answer"
            raise TooLongError(
                f"expected at most {self.context} positions, the context length here; got {x} tokens of input{what}: shorten it"
            )
        return self.context - taken

    @abstractmethod
    async def start(self) -> None:
        """Be ready for requests when this returns."""

    @abstractmethod
    def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Continue one request; nothing happens before the first piece is asked for.

        Leaving the loop early and closing the generator (`aclose`), or cancelling the task that waits in it, frees
        the request's row at once.

        Yields:
            pieces; the last one, and only it, has `finish`.

        Raises:
            NoSuchPrefixError: the version is not in the store any more, nor in memory.
            PrefixFileError: its file is damaged. WrongBaseError: it is of another base.
            TooLongError: virtual tokens, x and one token of y exceed the context.
            SettingsError: the engine cannot do what was asked.
            EngineStoppedError: see `stop`.
        """

    @abstractmethod
    async def forget(self, sha256s: Collection[str]) -> None:
        """Free the memory of these contents, whose names were deleted. Requests under way keep theirs to their end."""

    @abstractmethod
    def figures(self) -> Figures:
        """Cheap; asked for at every scrape."""

    def problem(self) -> str | None:
        """Why it will not answer requests any more, in one line; None while it does."""
        return None

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Refuse new requests, wait up to `grace` seconds for those under way, and fail the rest. May be called twice.

        While `start` is under way, that may raise.
        """
