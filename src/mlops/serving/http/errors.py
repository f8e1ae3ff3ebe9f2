"""Errors as a client sees them: the one table from error class to HTTP status, and the JSON body.

Every failure leaves the service as `{"error": {"type": …, "message": …}}`; `field` names the wrong
field of a request. Paths below `/v1/` speak as OpenAI's API does: the error has `message`, `type`,
`param` and `code`, and a wrong field is a 400. Only errors that are written for clients are told in
their own words. Of any other, which may hold paths and more of the inside, the log has the details.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops import errors
from mlops.serving.http.paths import speaks_openai
from mlops.serving.http.records import record_of

logger = logging.getLogger(__name__)

STATUS: dict[type[errors.MLOpsError], int] = {
    errors.MLOpsError: 500,
    errors.ConfigError: 500,
    errors.BentoMLError: 500,
    errors.PackagingError: 500,
    errors.IntegrityError: 500,
    errors.ServiceError: 503,
    errors.DeploymentError: 500,
    errors.EngineError: 500,
    errors.InvalidRequestError: 422,
    errors.PromptTooLongError: 422,
    errors.AdapterNotFoundError: 404,
    errors.QueueFullError: 429,
    errors.EngineShutdownError: 503,
    errors.DeadlineExceededError: 504,
    errors.TrackingError: 500,
    errors.MissingDependencyError: 500,
}


FOR_CLIENTS = (
    errors.InvalidRequestError,
    errors.AdapterNotFoundError,
    errors.QueueFullError,
    errors.EngineShutdownError,
    errors.DeadlineExceededError,
)
"""What is told in its own words."""

CLIENT_LEFT = 499
RETRY_AFTER_S = 1.0
"""After a 503: another replica, or this one when its model is loaded."""


class Failures:
    """ASGI middleware: what is raised behind it is answered, as long as no answer has begun.

    What comes later is raised on, and the server closes the connection: half an answer must not
    look like a whole one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as exc:
            if has_begun:
                raise
            record_of(scope).error = type(exc).__name__
            response: Response
            if isinstance(exc, ClientDisconnect):
                response = Response(status_code=CLIENT_LEFT)
            else:
                response = error_response(exc, like_openai=speaks_openai(scope))
            await response(scope, receive, send)


def status_of(exc: BaseException) -> int:
    """The status of the nearest class in the table; 500 for what the toolkit did not raise."""
    if isinstance(exc, HTTPException):
        return exc.status_code
    return next((STATUS[kind] for kind in type(exc).__mro__ if kind in STATUS), 500)


def describe(exc: BaseException) -> dict[str, Any]:
    """The body of the answer to a request that failed with `exc`."""
    status = status_of(exc)
    if not _is_for_clients(exc):
        message = "The service could not answer; its log says why."
        return {"error": {"type": _name_of(status), "message": message}}
    if isinstance(exc, HTTPException):
        return {"error": {"type": _name_of(status), "message": exc.detail}}
    error: dict[str, Any] = {"type": type(exc).__name__, "message": str(exc)}
    if isinstance(exc, errors.InvalidRequestError) and exc.field:
        error["field"] = exc.field
    if isinstance(exc, errors.QueueFullError):
        error["retry_after_s"] = exc.retry_after_s
    return {"error": error}


def openai_status_of(exc: BaseException) -> int:
    """The status that OpenAI's API gives: a field that is wrong is a 400, not a 422."""
    status = status_of(exc)
    return 400 if status == 422 else status


def openai_describe(exc: BaseException) -> dict[str, Any]:
    """The body of an answer, or the event of a stream, that failed with `exc`; in OpenAI's form."""
    status = openai_status_of(exc)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    param = exc.field or None if isinstance(exc, errors.InvalidRequestError) else None
    code = None
    if isinstance(exc, errors.AdapterNotFoundError):
        param, code = "model", "model_not_found"
    elif isinstance(exc, errors.PromptTooLongError):
        code = "context_length_exceeded"  # clients shorten the conversation and ask again
    elif status == 401:
        code = "invalid_api_key"
    elif status == 429:
        kind, code = "rate_limit_error", "rate_limit_exceeded"
    message = describe(exc)["error"]["message"]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(exc: BaseException, *, like_openai: bool = False) -> JSONResponse:
    """Answer with the status and body of `exc`; what is no client's mistake goes to the log."""
    log_failure(exc)
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    if isinstance(exc, errors.QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(exc.retry_after_s)))
    elif status_of(exc) == 503:
        headers.setdefault("Retry-After", str(math.ceil(RETRY_AFTER_S)))
    if like_openai:
        return JSONResponse(openai_describe(exc), openai_status_of(exc), headers)
    return JSONResponse(describe(exc), status_of(exc), headers)


def head_too_large(max_bytes: int) -> bytes:
    """The answer to a request whose line and headers have no end, as HTTP/1.1 on the wire."""
    message = f"the request's line and headers are over {max_bytes} bytes"
    return _on_the_wire(431, "Request Header Fields Too Large", message)


def too_many_connections() -> bytes:
    """The answer to a connection that there is no room for, as HTTP/1.1 on the wire."""
    return _on_the_wire(
        503, "Service Unavailable", "too many connections are open: try again later"
    )


def _on_the_wire(status: int, phrase: str, message: str) -> bytes:
    response = error_response(HTTPException(status, message))
    response.headers["connection"] = "close"
    lines = [b"HTTP/1.1 %d %b" % (status, phrase.encode())]
    lines += [b"%b: %b" % header for header in response.raw_headers]
    return b"\r\n".join((*lines, b"", bytes(response.body)))


def log_failure(exc: BaseException) -> None:
    """Log what is no client's mistake and what clients are not told."""
    if not _is_for_clients(exc):
        logger.error("a request failed", exc_info=exc)


def _is_for_clients(exc: BaseException) -> bool:
    if isinstance(exc, HTTPException):
        return exc.status_code != 500
    return isinstance(exc, FOR_CLIENTS)


def _name_of(status: int) -> str:
    """The phrase of a status as one word; "Error" for one that has none."""
    if status == 413:
        return "ContentTooLarge"  # earlier Pythons than 3.13 have an older phrase
    try:
        return HTTPStatus(status).phrase.title().replace(" ", "")
    except ValueError:
        return "Error"
