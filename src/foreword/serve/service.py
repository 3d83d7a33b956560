"""The server behind its routes: who asks, for which prefix, how x is framed, and the texts as they come."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request as HttpRequest

from foreword.data import fields_of, frame
from foreword.errors import DataError, NoSuchPrefixError, SettingsError, StoreError, TooLongError
from foreword.prefix import Framing
from foreword.serve.access import OPEN, Key, KeyFile
from foreword.serve.catalog import Catalog, Entry
from foreword.serve.engine import Engine, EngineStoppedError, Piece, Request, Sampling
from foreword.serve.limits import Limits
from foreword.serve.metrics import Metrics
from foreword.serve.problems import HungUpError, Problem, no_such_model
from foreword.serve.schemas import MAX_TEXTS
from foreword.store import Store, Version, check_name

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["Admin", "Asking", "Service", "Settings", "Texts", "while_connected"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

PLAIN = Framing(template="{input}")
"""How a prompt is taken as it is."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server allows.

    Args:
        max_texts: texts under way at once, running and waiting; more are told to come back later.
        timeout: seconds for one request, waiting included; a stream is to be read within five more.
        grace: seconds for the texts under way to end when the server is stopped.
        max_upload: bytes of an uploaded prefix file.
    """

    max_texts: int = 256
    timeout: float = 600.0
    grace: float = 30.0
    max_upload: int = 256 << 20

    def __post_init__(self) -> None:
        for name in ("timeout", "grace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"expected {name} as a number of seconds; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts to write for one request, one after another for each prompt.

    Args:
        requests: one a text.
        input_tokens: of all prompts, each counted once.
    """

    requests: Sequence[Request]
    input_tokens: int


class Service:
    """See the module.

    Args:
        base: frames x; its weights are the engine's affair.
        store: of the prefixes.
        engine: not yet started.
        keys: None lets everybody do everything.
        base_name: what requests call the base; None for its own name.
        settings: see `Settings`.

    Attributes:
        failure: why the engine did not start.
        on_failure: called then.
    """

    def __init__(
        self,
        base: Base,
        store: Store,
        engine: Engine,
        keys: KeyFile | None,
        base_name: str | None,
        settings: Settings,
    ):
        # where its files lie is nobody's business
        path = Path(os.path.expanduser(base.name))
        self.base_name = base_name or (path.resolve().name if path.exists() else base.name)
        self.base, self.store, self.engine, self.keys, self.settings = base, store, engine, keys, settings
        self.catalog = Catalog(store, engine, settings.timeout)
        self.limits = Limits(settings.max_texts)
        # twenty a token of every text may be asked for, on the loop that everybody waits for; no more than the vocabulary
        self._words: dict[int, str] = {}
        self.metrics = Metrics(engine, self.limits)
        self.began = int(time.time())
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._state = "starting"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine, and an eye on the store, for the time of a `with` block; it begins before the engine has started."""
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.create_task(self._start(), name="foreword-start")
        try:
            async with self.catalog.watching():
                yield
        finally:
            self.begin_to_stop()
            assert self._stopping is not None
            await self._stopping

    async def _start(self) -> None:
        log.info("starting the engine %s", self.engine.name)
        try:
            await self.engine.start()
            # computed once, over the whole base and its vocabulary
            await asyncio.to_thread(lambda: (self.base.fingerprint, self._longest_token))
        except Exception as error:
            if self._state == "starting":
                self.failure = error
                log.exception("the engine did not start")
                self.on_failure()
            return
        if self._state == "starting":
            self._state = "ready"
            log.info("ready: the base %s on the engine %s", self.base_name, self.engine.name)
        try:
            if await self.catalog.threads.run(self.store.versions, self.base_name):
                log.warning("the prefix %r is never used: the base is called so; see --base-name", self.base_name)
        except Exception:
            # a store that cannot be reached for a while ends no server
            log.exception("cannot look whether a prefix is called as the base")

    def begin_to_stop(self) -> None:
        """Take no new requests; those under way have the time of grace to end."""
        self._state = "stopping"
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="foreword-stop")

    async def _stop(self) -> None:
        await self.engine.stop(self.settings.grace)
        assert self._starting is not None
        await self._starting

    def stop_soon(self) -> None:
        """`begin_to_stop`, from a signal's handler or another thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.begin_to_stop)

    @property
    def problem(self) -> str | None:
        """Why the process is of no more use; None where it is."""
        return "the engine did not start; the log says why" if self.failure is not None else self.engine.problem()

    @property
    def not_ready(self) -> str | None:
        """Why requests should go to another server; None where they may come here."""
        return self.problem or (None if self._state == "ready" else self._state)

    def must_be_ready(self) -> None:
        """Raises `EngineStoppedError` where no texts can be asked for yet, or any more."""
        if self.not_ready is not None:
            raise EngineStoppedError(f"expected a server that is ready; it is not: {self.not_ready}")

    # who asks, and for what

    def key_of(self, request: HttpRequest) -> Key:
        """Whose request it is. Raises `Problem` (401)."""
        if self.keys is None:
            return OPEN
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        key = self.keys.find(given.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            message = "expected an API key that this server knows: give one as Authorization: Bearer KEY"
            raise Problem(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        request.state.facts["key"] = key.id
        return key

    def admin_of(self, request: HttpRequest) -> Key:
        """The same for what only admins may do. Raises `Problem` (401, 403)."""
        key = self.key_of(request)
        if not key.admin:
            raise Problem(403, "expected an admin's API key: see foreword keys add --admin", code="not_allowed")
        return key

    async def entry(self, key: Key, name: str) -> Entry:
        """The newest version of a prefix that the key may use. Raises `Problem` (404), or what a damaged file raises."""
        try:
            may_use = key.may_use(check_name(name))
        except StoreError:
            may_use = False  # what cannot be a name is nobody's name
        # somebody else's is not looked for: neither its damage nor its size is to be told from its absence
        if may_use:
            with suppress(NoSuchPrefixError):
                return await self.catalog.find(name)
        raise no_such_model(name)

    async def model(self, request: HttpRequest, key: Key, name: str) -> Entry | None:
        """What `model` names; None for the bare base. The request's line in the log tells it.

        Raises:
            Problem: there is none (404), or it is of another base (400).
            EngineStoppedError: the server is not ready.
        """
        self.must_be_ready()
        if name == self.base_name:
            return None
        entry = await self.entry(key, name)
        if entry.card.fingerprint != self.base.fingerprint:
            message = f"the prefix {entry.version.name!r} was trained on another base than {self.base_name!r}"
            raise Problem(400, message, code="wrong_base", param="model")
        request.state.facts.update(model=entry.version.name, version=entry.version.sha256[:12])
        return entry

    # x

    async def framed(self, record: Mapping[str, Any], framing: Framing) -> list[int]:
        """The token ids of x. Raises what `foreword.data.frame` does, and `TooLongError`."""
        return await asyncio.to_thread(frame, self.base, self._bounded(record, framing), framing, "the request")

    def _bounded(self, record: Mapping[str, Any], framing: Framing) -> Mapping[str, Any]:
        """The record without what could never be used of it: tokenizing a megabyte takes a second and hundreds of MB.

        Raises `TooLongError` where it cannot fit, and the framing does not cut it.
        """
        context = self.engine.context
        if context is None:
            return record
        most = context * self._longest_token
        messages = record.get("messages") if framing.chat else None
        if messages is not None:
            count = sum(len(one["content"]) for one in messages)
        else:
            named = ["input"] if framing.chat else [name for _, name in fields_of(framing.template) if name is not None]
            texts = {name: record[name] for name in named if isinstance(record.get(name), str)}
            count = sum(map(len, texts.values()))
        if count <= most:
            return record
        if framing.max_input_tokens is None:
            raise TooLongError(f"expected at most {most} characters, as many as {context} tokens may have; got {count}")
        if messages is not None:
            return {**record, "messages": [{**one, "content": one["content"][:most]} for one in messages]}
        return {**record, **{name: text[:most] for name, text in texts.items()}}

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters."""
        return max(map(len, self.base.tokenizer.get_vocab()))

    def checked_ids(self, tokens: Sequence[int]) -> list[int]:
        """Token ids that a client gave. Raises `DataError` where the base has no such."""
        known = self.base.embeddings.shape[0]
        if tokens and max(tokens) >= known:
            raise DataError(f"expected token ids below {known}; got {max(tokens)}")
        return list(tokens)

    def texts(
        self,
        request: HttpRequest,
        entry: Entry | None,
        prompts: Sequence[Sequence[int]],
        n: int,
        max_tokens: int | None,
        **sampling: Any,
    ) -> Texts:
        """n texts for each prompt.

        Args:
            request: that asks for them; its id begins theirs, in an engine's log.
            max_tokens: None for what the context leaves.
            sampling: the other arguments of `Sampling`.

        Raises:
            Problem: more texts than ever fit, or more tokens than the context leaves (400).
            TooLongError: a prompt leaves room for none.
        """
        count, most = n * len(prompts), min(MAX_TEXTS, self.settings.max_texts)
        if count > most:
            raise Problem(400, f"expected at most {most} texts of one request; got {count}", param="n")
        seed = sampling.pop("seed")
        version: Version | None = None if entry is None else entry.version
        requests: list[Request] = []
        for tokens in prompts:
            room = self.engine.room(len(tokens), 0 if entry is None else entry.length)
            if max_tokens is not None and room is not None and max_tokens > room:
                virtual = "" if entry is None or self.engine.is_encoder_decoder else f" and {entry.length} virtual ones"
                raise Problem(
                    400,
                    f"expected at most {room} for max_tokens, which the context of {self.engine.context} leaves after "
                    f"{len(tokens)} tokens of input{virtual}; got {max_tokens}",
                    code="context_length_exceeded",
                    param="max_tokens",
                )
            limit = max_tokens if max_tokens is not None else room
            if limit is None:
                raise Problem(400, "expected max_tokens, as this base's context has no end", param="max_tokens")
            for _ in range(n):
                own = None if seed is None else (seed + len(requests)) % (1 << 63)
                how = Sampling(max_tokens=limit, seed=own, **sampling)
                id = f"{request.state.request_id}-{uuid.uuid4().hex[:12]}"
                requests.append(Request(id=id, tokens=tuple(tokens), prefix=version, sampling=how))
        return Texts(requests=requests, input_tokens=sum(map(len, prompts)))

    # y

    def word(self, token: int) -> str:
        """The text of a token amid others, special ones too."""
        if token not in self._words:
            # some tokenizers leave out the space before the first
            once, twice = (str(self.base.tokenizer.decode([token] * count)) for count in (1, 2))
            self._words[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._words[token]

    async def pieces(self, key: Key, texts: Texts) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all texts as they come, each with its text's number.

        Raises:
            TooManyError: there is no room for so many.
            TimeoutError: it took longer than the settings allow.
            whatever the engine raises for one of them; the others are given up.
        """
        self.must_be_ready()
        with self.limits.entered(key, len(texts.requests), texts.input_tokens) as spend:
            self.metrics.input_tokens.inc(texts.input_tokens)
            began = time.monotonic()
            waiting = set(range(len(texts.requests)))
            async with aclosing(
                self._merged(texts.requests, asyncio.get_running_loop().time() + self.settings.timeout)
            ) as pieces:
                async for i, piece in pieces:
                    if i in waiting:
                        waiting.remove(i)
                        self.metrics.first_token.observe(time.monotonic() - began)
                    spend(len(piece.tokens))
                    self.metrics.output_tokens.inc(len(piece.tokens))
                    yield i, piece

    async def _merged(self, requests: Sequence[Request], deadline: float) -> AsyncGenerator[tuple[int, Piece], None]:
        queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

        async def run(i: int, request: Request) -> None:
            finish = None
            try:
                async with aclosing(self.engine.generate(request)) as pieces:
                    async for piece in pieces:
                        queue.put_nowait((i, piece))
                        finish = piece.finish
                if finish is None:
                    raise RuntimeError("the engine left a text without an end")
            except Exception as error:
                queue.put_nowait((i, error))

        tasks = [asyncio.create_task(run(i, request)) for i, request in enumerate(requests)]
        left = len(tasks)
        try:
            while left:
                async with asyncio.timeout_at(deadline):
                    i, piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish is not None
                yield i, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(request: HttpRequest, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """The result of `work`, which is cancelled when the client hangs up. Raises `HungUpError` then."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work()), asyncio.create_task(hung_up())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUpError
        return await task
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


_bearer = HTTPBearer(auto_error=False, description="An API key; none where the server asks for none.")


async def _asking(request: HttpRequest, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Key:
    service: Service = request.app.state.service
    return service.key_of(request)


async def _admin(request: HttpRequest, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Key:
    service: Service = request.app.state.service
    return service.admin_of(request)


Asking = Annotated[Key, Depends(_asking)]
"""Whose request it is; a route that has it answers nobody else."""
Admin = Annotated[Key, Depends(_admin)]
"""The same for what only admins may do."""
