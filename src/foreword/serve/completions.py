"""/v1/completions and /v1/chat/completions, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from foreword.prefix import Framing
from foreword.serve import schemas
from foreword.serve.access import Key
from foreword.serve.engine import Finish, Piece, TokenLogprob
from foreword.serve.problems import HungUpError, Problem, problem_of
from foreword.serve.service import PLAIN, Asking, Service, Texts, while_connected
from foreword.text import TextSoFar

__all__ = ["router"]

log = logging.getLogger(__name__)

router = APIRouter(tags=["texts"])

LAST_WORDS = 5.0
"""Seconds that the end of a stream may take once its time is up, until its client counts as one that has gone."""

STREAMED = {"text/event-stream": {"schema": {"type": "string"}}}


class _Shape(Protocol):
    """What one of the two kinds of answers looks like."""

    def whole(self, said: Sequence[_Said], usage: schemas.Usage) -> BaseModel: ...

    def first(self, i: int) -> BaseModel | None: ...

    def chunk(self, i: int, piece: Piece) -> BaseModel: ...

    def last(self, usage: schemas.Usage) -> BaseModel: ...


class _Said:
    """One text so far."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish = "stop"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += len(piece.tokens)
        self.logprobs += piece.logprobs
        self.finish = piece.finish or self.finish


class _CompletionShape:
    def __init__(self, service: Service, body: schemas.CompletionRequest, count: int):
        self.service, self.body = service, body
        self.head: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self.texts = [TextSoFar(service.base.decode) for _ in range(count)]
        self.offsets = [0] * count

    def logprobs(self, i: int, given: Sequence[TokenLogprob]) -> schemas.CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        told = schemas.CompletionLogprobs(top_logprobs=[] if self.body.logprobs else None)
        for one in given:
            word = self.service.word(one.token)
            told.tokens.append(word)
            told.token_logprobs.append(one.logprob)
            told.text_offset.append(self.offsets[i])
            if told.top_logprobs is not None:
                top = {self.service.word(token): value for token, value in reversed(one.top)}
                told.top_logprobs.append({**top, word: one.logprob})
            # in the text as it is shown, where several tokens may make one character
            self.offsets[i] += len(self.texts[i].add(one.token))
        return told

    def whole(self, said: Sequence[_Said], usage: schemas.Usage) -> BaseModel:
        choices = [self._choice(i, one) for i, one in enumerate(said)]
        return schemas.Completion(**self.head, choices=choices, usage=usage)

    def _choice(self, i: int, one: _Said | Piece) -> schemas.CompletionChoice:
        return schemas.CompletionChoice(
            index=i, text=one.text, logprobs=self.logprobs(i, one.logprobs), finish_reason=one.finish
        )

    def first(self, i: int) -> None:
        return None

    def chunk(self, i: int, piece: Piece) -> BaseModel:
        return schemas.Completion(**self.head, choices=[self._choice(i, piece)])

    def last(self, usage: schemas.Usage) -> BaseModel:
        return schemas.Completion(**self.head, choices=[], usage=usage)


class _ChatShape:
    def __init__(self, service: Service, body: schemas.ChatRequest):
        self.service, self.body = service, body
        id = f"chatcmpl-{uuid.uuid4().hex}"
        self.head: dict[str, Any] = {"id": id, "created": int(time.time()), "model": body.model}

    def logprobs(self, given: Sequence[TokenLogprob]) -> schemas.ChatLogprobs | None:
        if not self.body.logprobs:
            return None

        def told(token: int, value: float) -> dict[str, Any]:
            word = self.service.word(token)
            # a token may be a part of a character
            return {"token": word, "logprob": value, "bytes": None if "\ufffd" in word else list(word.encode())}

        content = [
            schemas.ChatLogprob(
                **told(one.token, one.logprob), top_logprobs=[schemas.TopLogprob(**told(*top)) for top in one.top]
            )
            for one in given
        ]
        return schemas.ChatLogprobs(content=content)

    def whole(self, said: Sequence[_Said], usage: schemas.Usage) -> BaseModel:
        choices = [
            schemas.ChatChoice(
                index=i,
                message=schemas.ChatMessage(content=one.text),
                logprobs=self.logprobs(one.logprobs),
                finish_reason=one.finish,
            )
            for i, one in enumerate(said)
        ]
        return schemas.ChatCompletion(**self.head, choices=choices, usage=usage)

    def _chunk(self, i: int, delta: schemas.ChatDelta, **more: Any) -> BaseModel:
        return schemas.ChatChunk(**self.head, choices=[schemas.ChatChunkChoice(index=i, delta=delta, **more)])

    def first(self, i: int) -> BaseModel:
        return self._chunk(i, schemas.ChatDelta(role="assistant", content=""))

    def chunk(self, i: int, piece: Piece) -> BaseModel:
        delta = schemas.ChatDelta(content=piece.text)
        return self._chunk(i, delta, logprobs=self.logprobs(piece.logprobs), finish_reason=piece.finish)

    def last(self, usage: schemas.Usage) -> BaseModel:
        return schemas.ChatChunk(**self.head, choices=[], usage=usage)


def _usage(texts: Texts, output: int) -> schemas.Usage:
    return schemas.Usage(
        prompt_tokens=texts.input_tokens, completion_tokens=output, total_tokens=texts.input_tokens + output
    )


class _Events(StreamingResponse):
    """Server-sent events, which end when the client hangs up, or reads no further.

    Args:
        request: whose answer it is.
        events: what is sent.
        seconds: after which a client that has not read them all counts as one that hung up.
        headers: that go with them.
    """

    media_type = "text/event-stream"

    def __init__(
        self, request: HttpRequest, events: AsyncGenerator[bytes, None], seconds: float, headers: Mapping[str, str]
    ):
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self.request, self.events, self.seconds = request, events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            try:
                async with asyncio.timeout(self.seconds):
                    await while_connected(self.request, lambda: self.stream_response(send))
            except TimeoutError:
                raise HungUpError from None


def _event(data: BaseModel) -> bytes:
    return f"data: {data.model_dump_json()}\n\n".encode()


async def _answer(
    service: Service, request: HttpRequest, key: Key, body: schemas._Shared, texts: Texts, shape: _Shape
) -> Response:
    pieces = service.pieces(key, texts)
    if not body.stream:

        async def all_said() -> list[_Said]:
            said = [_Said() for _ in texts.requests]
            async with aclosing(pieces):
                async for i, piece in pieces:
                    said[i].add(piece)
            return said

        said = await while_connected(request, all_said)
        usage = _usage(texts, sum(one.tokens for one in said))
        return JSONResponse(shape.whole(said, usage).model_dump(), headers=_pinned(texts))

    # what fails before the first piece is an error of its own, not a line of the stream
    try:
        first = await while_connected(request, pieces.__anext__)
    except BaseException:
        await pieces.aclose()
        raise
    events = _events(pieces, first, texts, shape, body.wants_usage)
    return _Events(request, events, service.settings.timeout + LAST_WORDS, _pinned(texts))


def _pinned(texts: Texts) -> dict[str, str]:
    """Which content the answer was made with, whatever becomes of the name."""
    version = texts.requests[0].prefix
    return {} if version is None else {"x-prefix-sha256": version.sha256}


async def _events(
    pieces: AsyncGenerator[tuple[int, Piece], None],
    first: tuple[int, Piece],
    texts: Texts,
    shape: _Shape,
    wants_usage: bool,
) -> AsyncGenerator[bytes, None]:
    async def all_pieces() -> AsyncIterator[tuple[int, Piece]]:
        yield first
        async for one in pieces:
            yield one

    output = 0
    begun: set[int] = set()
    async with aclosing(pieces):
        try:
            async for i, piece in all_pieces():
                if i not in begun:
                    begun.add(i)
                    head = shape.first(i)
                    if head is not None:
                        yield _event(head)
                output += len(piece.tokens)
                if piece.text or piece.logprobs or piece.finish:
                    yield _event(shape.chunk(i, piece))
        except Exception as error:
            problem = problem_of(error)
            if problem.status >= 500:
                log.exception("a stream failed")
            yield f"data: {json.dumps(problem.body, ensure_ascii=False)}\n\n".encode()
            return
    if wants_usage:
        yield _event(shape.last(_usage(texts, output)))
    yield b"data: [DONE]\n\n"


@router.post(
    "/v1/completions",
    response_model=schemas.Completion,
    responses={200: {"content": STREAMED, "description": "The texts, or a stream of their pieces."}},
)
async def completions(request: HttpRequest, key: Asking, body: schemas.CompletionRequest) -> Response:
    """Continue prompts, each after the prefix that `model` names."""
    service: Service = request.app.state.service
    if body.best_of not in (None, body.n):
        raise Problem(400, f"expected best_of to be the same as n, or nothing; got {body.best_of}", param="best_of")
    entry = await service.model(request, key, body.model)
    framing: Framing = PLAIN if entry is None or not body.frame else entry.card.framing
    given: Any = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
    if body.record is not None and (framing is PLAIN or framing.chat or not isinstance(given[0], str)):
        raise Problem(400, "expected a record only where a prefix's template frames it", param="record")
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append(await service.framed({**(body.record or {}), "input": prompt}, framing))
        else:
            prompts.append(service.checked_ids(prompt))
    texts = service.texts(request, entry, prompts, body.n, body.max_tokens, logprobs=body.logprobs, **body.how)
    return await _answer(service, request, key, body, texts, _CompletionShape(service, body, len(texts.requests)))


@router.post(
    "/v1/chat/completions",
    response_model=schemas.ChatCompletion,
    responses={200: {"content": STREAMED, "description": "The answers, or a stream of their pieces."}},
)
async def chat_completions(request: HttpRequest, key: Asking, body: schemas.ChatRequest) -> Response:
    """Answer messages, after a prefix that was trained on chats, or as the bare base does."""
    service: Service = request.app.state.service
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, "expected logprobs to be true where top_logprobs is given", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise Problem(400, "expected max_tokens or max_completion_tokens; got both", param="max_tokens")
    if body.messages[-1].role == "assistant":
        raise Problem(400, "expected the last message to be the user's; got the assistant's", param="messages")
    entry = await service.model(request, key, body.model)
    if entry is not None and not entry.card.framing.chat:
        raise Problem(
            400,
            f"the prefix {entry.version.name!r} was not trained on chats: use /v1/completions, whose prompt is framed as in "
            "its training",
            code="not_a_chat_model",
            param="model",
        )
    framing = Framing(chat=True) if entry is None else entry.card.framing
    messages = [
        {"role": "system" if one.role == "developer" else one.role, "content": one.text} for one in body.messages
    ]
    prompt = await service.framed({"messages": messages}, framing)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    limit = body.max_tokens or body.max_completion_tokens
    texts = service.texts(request, entry, [prompt], body.n, limit, logprobs=logprobs, **body.how)
    return await _answer(service, request, key, body, texts, _ChatShape(service, body))
