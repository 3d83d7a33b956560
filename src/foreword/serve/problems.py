"""What went wrong, in the shape in which OpenAI's API says it, and with the status that goes with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from foreword.errors import ForewordError, NoSuchPrefixError, PrefixFileError, TooLongError, WrongBaseError, one_line
from foreword.serve.engine import EngineStoppedError
from foreword.serve.limits import TooManyError
from foreword.serve.schemas import KINDS

__all__ = ["HungUpError", "Problem", "no_such_model", "problem_of"]

log = logging.getLogger(__name__)


class Problem(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line that says what was expected, what came, and what to do.
        code: for programs.
        param: which part of the request.
        headers: that go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class HungUpError(Exception):
    """The client has gone; nobody waits for an answer."""


def problem_of(error: Exception) -> Problem:
    """The problem that an exception is; what nobody expected is told to nobody."""
    if isinstance(error, Problem):
        return error
    message = one_line(error, 1000)
    if isinstance(error, TooManyError):
        again = {"retry-after": str(error.retry_after)}
        return Problem(429, message, code=f"{error.what}_limit_exceeded", headers=again)
    if isinstance(error, EngineStoppedError):
        return Problem(503, message, code="not_ready", headers={"retry-after": "5"})
    if isinstance(error, NoSuchPrefixError):
        return Problem(404, message, code="model_not_found", param="model")
    if isinstance(error, TooLongError):
        return Problem(400, message, code="context_length_exceeded")
    if isinstance(error, PrefixFileError) and not isinstance(error, WrongBaseError):
        return Problem(500, message, code="prefix_damaged", param="model")
    if isinstance(error, ForewordError):
        return Problem(400, message, param="model" if isinstance(error, WrongBaseError) else None)
    if isinstance(error, TimeoutError):
        return Problem(504, "the answer took longer than this server allows: ask for fewer tokens", code="timeout")
    if isinstance(error, OSError):
        again = {"retry-after": "5"}
        return Problem(503, "the store cannot be reached: try again", code="store_unavailable", headers=again)
    return Problem(500, "the server failed; its log says why", code="internal_error")


def no_such_model(name: str) -> Problem:
    """The same for a prefix that is not there and for one that is somebody else's."""
    message = f"no model {name[:256]!r}: see /v1/models for those that you may use"
    return Problem(404, message, code="model_not_found", param="model")


async def on_problem(request: Request, error: Exception) -> JSONResponse:
    problem = problem_of(error)
    if problem.status >= 500 and problem.code != "not_ready":
        # of an OSError the system's own words are no client's
        why = f": {error.strerror or error}" if isinstance(error, OSError) else ""
        log.error("a request failed: %s%s", problem.code, why, exc_info=error)
    return problem.response()


async def on_http(request: Request, error: Exception) -> JSONResponse:
    """What is said before a request is looked at: no such path or method, nobody known, or a request that is too large."""
    assert isinstance(error, HTTPException)
    code = {401: "invalid_api_key", 413: "too_large"}.get(error.status_code)
    return Problem(error.status_code, str(error.detail), code=code, headers=error.headers).response()


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(400, f"expected a body in JSON; at character {first['loc'][-1]} it is none").response()
    sent = request.headers.get("content-type", "")
    if first["loc"] == ("body",) and "json" not in sent:
        return Problem(400, f"expected Content-Type: application/json; got {sent[:64]!r}").response()
    not_of_the_place = ("body", "query", "path", "header", *KINDS)
    param = ".".join(str(part) for part in first["loc"] if part not in not_of_the_place) or None
    where = f"{param}: " if param else ""
    return Problem(400, where + str(first["msg"]), param=param).response()
