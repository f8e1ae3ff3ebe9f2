"""Every error class of the toolkit.

MLOpsError
├─ ConfigError                  a field of a configuration is unknown or out of range (ValueError)
├─ BentoMLError                 packaging and serving; carries `operation` and `details`
│   ├─ PackagingError           the checkpoint, the name or the store does not allow it
│   ├─ IntegrityError           bytes differ from what their digest says
│   ├─ ServiceError             a service cannot be created or its model cannot be loaded
│   └─ DeploymentError          a service cannot be put where it was to run
├─ EngineError                  text generation
│   ├─ InvalidRequestError      a request's field is missing or out of range
│   │   └─ PromptTooLongError   the prompt, or it and the answer, have too many tokens
│   ├─ AdapterNotFoundError     the request names an adapter that is not there
│   ├─ QueueFullError           too many requests are waiting
│   ├─ EngineShutdownError      the engine is stopping or has no model loaded
│   └─ DeadlineExceededError    the request's time is over
├─ TrackingError                MLflow refused or cannot be reached
└─ MissingDependencyError       an optional library is not installed; says how to install it

Which HTTP status a class becomes stands in `mlops.serving.http.errors`, and nowhere else.
Every class survives pickling, because errors cross process boundaries.
"""

from __future__ import annotations

from typing import Any

from mlops.installation import install_command


class MLOpsError(Exception):
    """Base of every error raised on purpose by this toolkit."""


def sentence_of(exc: BaseException) -> str:
    """What an error says: the sentence of one of ours; of another also its class."""
    if isinstance(exc, MLOpsError):
        return str(exc)
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


class ConfigError(MLOpsError, ValueError):
    """A configuration field is unknown or has a value that is not allowed."""


class BentoMLError(MLOpsError):
    """Packaging or serving failed.

    Args:
        message: one sentence that says what is wrong and what to do about it.
        operation: the step that failed, such as `"validate_model_path"`.
        details: facts for a program to read: paths, tags, digests. JSON types only.
    """

    def __init__(
        self, message: str, operation: str = "", details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation
        self.details = dict(details or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.operation, self.details)


class PackagingError(BentoMLError):
    """The checkpoint, the name or the store does not allow packaging."""


class IntegrityError(BentoMLError):
    """Stored bytes differ from what their digest says."""


class ServiceError(BentoMLError):
    """A service cannot be created, or its model cannot be loaded."""


class DeploymentError(BentoMLError):
    """A service cannot be put where it was to run."""


class EngineError(MLOpsError):
    """Text generation failed."""


class InvalidRequestError(EngineError):
    """A request's field is missing or out of range.

    Args:
        message: one sentence that names the field, its value and what is allowed.
        field: the name of the field, or "" when the request as a whole is wrong.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.field)


class PromptTooLongError(InvalidRequestError):
    """The prompt has more tokens than are allowed, or too many for the answer that is asked for."""


class AdapterNotFoundError(EngineError):
    """The request names an adapter that the service does not have."""


class QueueFullError(EngineError):
    """Too many requests are waiting.

    Args:
        message: one sentence with the numbers.
        retry_after_s: seconds after which another try makes sense.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.retry_after_s)


class EngineShutdownError(EngineError):
    """The engine is stopping, or has no model loaded."""


class DeadlineExceededError(EngineError):
    """The request's time is over."""


class TrackingError(MLOpsError):
    """MLflow refused the call or cannot be reached."""


class MissingDependencyError(MLOpsError):
    """An optional library is not installed.

    Args:
        library: what failed to import, such as `"ray"`.
        extra: the extra of this distribution that brings it, or "" when it is a core dependency.
    """

    def __init__(self, library: str, extra: str = "") -> None:
        super().__init__(
            f"{library} is not installed; install it with: {install_command(library, extra)}"
        )
        self.library = library
        self.extra = extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.library, self.extra)
