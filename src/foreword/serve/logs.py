"""Logs: a line of JSON an event, without prompts, texts or keys; and what is told of every request."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreword.serve.metrics import Metrics
from foreword.serve.problems import HungUpError, problem_of

__all__ = ["EngineFormatter", "JsonFormatter", "Told", "log_as_json"]

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

HUNG_UP = 499
"""The status in logs and figures of a request whose client did not wait for one."""

log = logging.getLogger("foreword.serve.requests")


class JsonFormatter(logging.Formatter):
    """One line of JSON: time, level, logger, message, and what `extra={"facts": {...}}` says.

    Of exceptions it says where, but not with what: their messages may hold a client's text.
    """

    whole = False
    """Whether exceptions tell their message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            if self.whole:
                line["because"] = str(record.exc_info[1])
            line["at"] = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(record.exc_info[2])[-8:]]
        return json.dumps(line, ensure_ascii=False)


class EngineFormatter(JsonFormatter):
    """That of vLLM's processes: why they did not start stands in an exception."""

    whole = True


def log_as_json() -> None:
    """Send the logs of foreword, of uvicorn, and of vLLM's processes to stderr, a line of JSON each."""
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).with_name("vllm_logs.json")))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("foreword", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Told:
    """Around an application: an id for every request, a line in the log, figures, and a clean error for what failed.

    A request's id is what the client gave in `X-Request-Id`, if that is a short word, or a new one.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        facts: MutableMapping[str, Any] = {"request": id, "method": scope["method"]}
        scope.setdefault("state", {}).update(request_id=id, facts=facts)
        status = 0
        whole = hung_up = False
        began = time.perf_counter()

        async def told_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        async def told_receive() -> Message:
            nonlocal whole, hung_up
            message = await receive()
            whole |= message["type"] == "http.request" and not message.get("more_body", False)
            # in the middle of the body; whoever reads it may take that for a body that is wrong
            hung_up |= message["type"] == "http.disconnect" and not whole
            return message

        try:
            await self.app(scope, told_receive, told_send)
        except (HungUpError, ClientDisconnect):
            hung_up = True
        except Exception as error:
            log.exception("a request failed", extra={"facts": {"request": id}})
            if not status:
                await problem_of(error).response()(scope, receive, told_send)
        finally:
            if hung_up:
                self.metrics.abandoned.inc()
                status = HUNG_UP if not whole else status or HUNG_UP
            route = getattr(scope.get("route"), "path", None) or "none"
            seconds = time.perf_counter() - began
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            facts.update(route=route, status=status, seconds=round(seconds, 4))
            log.info("request", extra={"facts": dict(facts)})
