from __future__ import annotations

import inspect

import pytest
from starlette.exceptions import HTTPException

from mlops import errors
from mlops.serving.http.errors import STATUS, describe, error_response, status_of

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.MLOpsError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_class_has_a_status(kind: type[errors.MLOpsError]) -> None:
    assert kind in STATUS


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequestError("no", "text"), 422),
        (errors.AdapterNotFoundError("no"), 404),
        (errors.QueueFullError("no"), 429),
        (errors.EngineShutdownError("no"), 503),
        (errors.DeadlineExceededError("no"), 504),
        (HTTPException(413, "no"), 413),
        (RuntimeError("no"), 500),
    ],
)
def test_status(error: Exception, status: int) -> None:
    assert status_of(error) == status
    assert error_response(error).status_code == status


def test_a_subclass_has_the_status_of_its_nearest_class() -> None:
    class ToolError(errors.InvalidRequestError):
        pass

    assert status_of(ToolError("no")) == 422


def test_the_field_is_named() -> None:
    told = describe(errors.InvalidRequestError("max_tokens is -1: use 1 or more", "max_tokens"))
    assert told == {
        "error": {
            "type": "InvalidRequestError",
            "message": "max_tokens is -1: use 1 or more",
            "field": "max_tokens",
        }
    }


def test_retry_after_is_whole_seconds() -> None:
    response = error_response(errors.QueueFullError("full", retry_after_s=1.2))
    assert response.headers["Retry-After"] == "2"


@pytest.mark.parametrize(
    "error", [RuntimeError("/srv/secret"), errors.IntegrityError("/srv/secret is damaged")]
)
def test_an_inner_failure_tells_a_client_nothing(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    response = error_response(error)
    assert b"secret" not in bytes(response.body)
    assert "secret" in caplog.text
