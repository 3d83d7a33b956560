"""The application: every route, and what stands around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import PathLike
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreword.errors import ForewordError
from foreword.serve import completions, prefixes, problems, schemas
from foreword.serve.access import KeyFile
from foreword.serve.engine import Engine
from foreword.serve.logs import Told
from foreword.serve.service import Admin, Service, Settings
from foreword.store import Store
from foreword.version import __version__

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["create_app"]

MAX_WORDS = 4 << 20
"""Bytes of a request but an upload: while one is parsed everybody waits, for a fifth of a second."""


def create_app(
    base: Base,
    store: Store | str | PathLike[str],
    *,
    engine: Engine,
    keys: KeyFile | str | PathLike[str] | None = None,
    base_name: str | None = None,
    settings: Settings | None = None,
) -> FastAPI:
    """An ASGI application that serves one base and the prefixes of a store.

    Args:
        base: frames x, and its fingerprint is what prefixes are checked against.
        store: or where it is.
        engine: started and stopped with the application.
        keys: a file of API keys. None lets everybody do everything: for one's own machine.
        base_name: what requests call the base. Default: its name, of a folder or a file the last part alone.
        settings: see `Settings`.

    Raises:
        StoreError: there is no store. SettingsError: the file of keys is something else.
    """
    store = store if isinstance(store, Store) else Store(store)
    keys = keys if keys is None or isinstance(keys, KeyFile) else KeyFile(keys)
    service = Service(base, store, engine, keys, base_name, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    error = {"model": schemas.ErrorBody}
    app = FastAPI(
        title="foreword",
        version=__version__,
        lifespan=lifespan,
        responses={"4XX": error, "5XX": error},
        exception_handlers={
            RequestValidationError: problems.on_invalid,
            HTTPException: problems.on_http,
            problems.Problem: problems.on_problem,
            ForewordError: problems.on_problem,
            OSError: problems.on_problem,  # of which TimeoutError is one
        },
    )
    app.state.service = service
    app.include_router(completions.router)
    app.include_router(prefixes.router)
    for path, state in (("/health", health), ("/ready", ready)):
        app.add_api_route(
            path, state, tags=["state"], responses={503: {"description": "The same, with what is wrong."}}
        )
    app.add_api_route("/metrics", metrics, tags=["state"], response_class=Response)
    app.add_middleware(Bounded, service=service)
    app.add_middleware(Told, metrics=service.metrics)
    return app


class Bounded:
    """Around an application: no request's body is read further than it may be long, or before it is known whose it is, or
    later than a request may last.

    Args:
        service: knows the keys, and the settings.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.service.settings.max_upload if scope.get("method") == "PUT" else MAX_WORDS
        said = dict(scope.get("headers", ())).get(b"content-length", b"")
        # one that says itself that it is too long is refused unread
        told = int(said[:20]) if said.isdigit() else 0
        seen = 0
        deadline: float | None = asyncio.get_running_loop().time() + self.service.settings.timeout
        known = scope.get("method") not in ("POST", "PUT")
        too_large = HTTPException(413, f"expected a request of at most {limit:,} bytes; got a larger one")

        async def counted() -> Message:
            nonlocal seen, known, deadline
            if not known:
                # raised here, an HTTPException alone passes through FastAPI as it is
                try:
                    self.service.key_of(Request(scope))
                except problems.Problem as problem:
                    raise HTTPException(problem.status, problem.message, problem.headers) from None
                known = True
            if told > limit:
                raise too_large
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                seconds = self.service.settings.timeout
                said = f"expected the whole request within {seconds:g} s; send it faster"
                raise HTTPException(408, said, {"connection": "close"}) from None
            if not message.get("more_body"):
                # from here on it is awaited that the client goes
                deadline = None
            seen += len(message.get("body", b""))
            if seen > limit:
                raise too_large
            return message

        await self.app(scope, counted, send)


async def health(request: Request) -> Response:
    """200 while the process can answer texts: otherwise start it anew."""
    problem = request.app.state.service.problem
    return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)


async def ready(request: Request) -> Response:
    """200 while new requests may come: otherwise send them elsewhere."""
    why = request.app.state.service.not_ready
    return JSONResponse({"status": why or "ready"}, 503 if why else 200)


async def metrics(request: Request, _: Admin) -> Response:
    """Figures in Prometheus' format; where there are keys, for an admin's."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
