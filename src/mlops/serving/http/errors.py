"""Errors as a client sees them: the one table from error class to HTTP status, and the JSON body.

Every failure leaves the service as `{"error": {"type": …, "message": …}}`; `field` names the wrong
field of a request. Paths below `/v1/` speak as OpenAI's API does: the error has `message`, `type`,
`param` and `code`, and a wrong field is a 400. A status of 500 says nothing of the inside: the log
has the details.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mlops import errors

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
    errors.AdapterNotFoundError: 404,
    errors.QueueFullError: 429,
    errors.EngineShutdownError: 503,
    errors.DeadlineExceededError: 504,
    errors.TrackingError: 500,
    errors.MissingDependencyError: 500,
}


def status_of(exc: BaseException) -> int:
    """The status of the nearest class in the table; 500 for what the toolkit did not raise."""
    if isinstance(exc, HTTPException):
        return exc.status_code
    return next((STATUS[kind] for kind in type(exc).__mro__ if kind in STATUS), 500)


def describe(exc: BaseException) -> dict[str, Any]:
    """The body of the answer to a request that failed with `exc`."""
    status = status_of(exc)
    if isinstance(exc, HTTPException):
        # Python 3.13 has RFC 9110's phrase for 413, earlier ones have an older.
        phrase = "Content Too Large" if status == 413 else HTTPStatus(status).phrase
        return {"error": {"type": phrase.title().replace(" ", ""), "message": exc.detail}}
    if status == 500:
        message = "The service could not answer; its log says why."
        return {"error": {"type": "InternalServerError", "message": message}}
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
    elif isinstance(exc, errors.QueueFullError):
        kind, code = "rate_limit_error", "rate_limit_exceeded"
    message = describe(exc)["error"]["message"]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(exc: BaseException, *, like_openai: bool = False) -> JSONResponse:
    """Answer with the status and body of `exc`; what is no client's mistake goes to the log."""
    log_failure(exc)
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    if isinstance(exc, errors.QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(exc.retry_after_s)))
    if like_openai:
        return JSONResponse(openai_describe(exc), openai_status_of(exc), headers)
    return JSONResponse(describe(exc), status_of(exc), headers)


def log_failure(exc: BaseException) -> None:
    """Log what is no client's mistake and what clients are not told."""
    if status_of(exc) == 500:
        logger.error("a request failed", exc_info=exc)
