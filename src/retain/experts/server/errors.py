"""Everything that goes wrong, in the shape that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from retain.errors import ConfigError, RetainError
from retain.experts.asks import Busy, Stopping

log = logging.getLogger(__name__)
INVALID, SERVER = "invalid_request_error", "server_error"


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: Problem


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line.
        type, param, code: as in OpenAI's errors; `param` names the field of the request.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code, self.headers = status, type, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        problem = {"message": _sound(str(self)), "type": self.type, "param": self.param, "code": self.code}
        problem["param"] = None if self.param is None else _sound(self.param)
        return {"error": problem}

    def response(self) -> JSONResponse:
        """The answer as it is sent."""
        return JSONResponse(self.body, self.status, self.headers)


class Left(Exception):
    """The client has gone; there is nobody to answer."""


#: What a route may answer besides its own, for the description of the interface.
RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is malformed, or asks for what is not there."},
    401: {"model": ErrorBody, "description": "No key, or a wrong one."},
    404: {"model": ErrorBody, "description": "No such model or route."},
    408: {"model": ErrorBody, "description": "The request did not arrive in time."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    429: {"model": ErrorBody, "description": "The queue is full; see the header Retry-After."},
    500: {"model": ErrorBody, "description": "The model failed."},
    503: {"model": ErrorBody, "description": "The server is stopping."},
    504: {"model": ErrorBody, "description": "The answer was not there in time."},
}
UPSTREAM: dict[int | str, dict[str, Any]] = {
    502: {"model": ErrorBody, "description": "The engine behind this server cannot be reached."}
}


def api_error(error: Exception) -> ApiError:
    """The answer for whatever was raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        wait = {"Retry-After": str(math.ceil(error.wait))}
        return ApiError(429, str(error), "rate_limit_error", code="queue_full", headers=wait)
    if isinstance(error, Stopping):
        return ApiError(503, str(error), SERVER, code="stopping", headers={"Retry-After": "5"})
    if isinstance(error, ConfigError):
        where = str(error).partition(":")[0]
        return ApiError(400, str(error), param=where if where.isidentifier() else None, code="invalid_value")
    if isinstance(error, RetainError):
        return ApiError(500, str(error), SERVER, code="model_failed")
    if isinstance(error, Left):
        return ApiError(499, "The client has left.", code="left")
    if isinstance(error, TimeoutError):
        return ApiError(504, "No answer in time. Ask for less, or later.", SERVER, code="timeout")
    if isinstance(error, RequestValidationError):
        return _malformed(error)
    if isinstance(error, HTTPException):
        code = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code=code, headers=dict(error.headers or {}))
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"The server failed ({type(error).__name__}). Its log says more.", SERVER)


def install(app: FastAPI) -> None:
    """Answer every error of an application in this shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        found = api_error(error)
        if found.status in (404, 405) and found.code in ("not_found", "method_not_allowed"):
            allowed = (found.headers or {}).get("allow", "")
            rest = f" Allowed: {allowed}." if allowed else " The routes are in /openapi.json."
            found = ApiError(
                found.status,
                f"{request.method} {request.url.path}: {found}.{rest}",
                INVALID,
                None,
                found.code,
                found.headers,
            )
        return found.response()

    for kind in (ApiError, RetainError, Left, TimeoutError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _malformed(error: RequestValidationError) -> ApiError:
    """The first mistake of a body, in one line."""
    mistakes = error.errors()
    first = mistakes[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"The body is not JSON ({why}).", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{place}: unknown, or not supported here. Leave it out.", param=place, code="unsupported_parameter"
        )
    message = f"{place or 'body'}: {first['msg'].removeprefix('Value error, ')}"
    return ApiError(400, message + ("" if message.endswith(".") else "."), param=place or None, code="invalid_value")


def _sound(text: str) -> str:
    """A text that can be sent: halves of surrogate pairs, which JSON may hold, are replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")
