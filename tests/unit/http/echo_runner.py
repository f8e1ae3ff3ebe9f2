"""A runner without a model: it echoes, fails, waits or sleeps as a test asks it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlops.errors import AdapterNotFoundError, InvalidRequestError
from mlops.serving.runner.base import Prediction


class EchoRunner:
    """Answers with the request's text. `gate` holds every batch until a test opens it."""

    def __init__(self, load_error: Exception | None = None) -> None:
        self.load_error = load_error
        self.is_loaded = False
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.batches: list[list[Any]] = []

    def load_model(self) -> None:
        if self.load_error:
            raise self.load_error
        self.is_loaded = True

    def predict(self, input_data: str | Mapping[str, Any]) -> Prediction:
        (answer,) = self.predict_batch([input_data])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def predict_batch(
        self, inputs: Sequence[str | Mapping[str, Any]]
    ) -> list[Prediction | Exception]:
        self.batches.append(list(inputs))
        self.started.set()
        self.gate.wait(30)
        return [self._answer(fields) for fields in inputs]

    def get_memory_usage(self) -> dict[str, Any]:
        return {
            "active_mb": 2.0,
            "cache_mb": 1.0,
            "total_mb": 3.0,
            "peak_mb": 4.0,
            "mlx_available": True,
        }

    def unload_model(self) -> None:
        self.is_loaded = False

    def _answer(self, fields: Any) -> Prediction | Exception:
        if fields.get("adapter"):
            return AdapterNotFoundError(f"there is no adapter {fields['adapter']!r}")
        if "wrong" in fields:
            return InvalidRequestError("wrong is not a field of a request", "wrong")
        if fields.get("text") == "crash":
            return RuntimeError("secret path /srv/weights")
        return {"prediction": fields.get("text"), "mlx_optimized": True, "model_type": "mlx"}


class CancellableRunner(EchoRunner):
    """Tells a test whether it was asked to stop in the middle of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.was_cancelled = threading.Event()

    def predict_batch(
        self,
        inputs: Sequence[str | Mapping[str, Any]],
        *,
        is_cancelled: Sequence[Callable[[], bool]] = (),
    ) -> list[Prediction | Exception]:
        self.started.set()
        while not self.gate.wait(0.005):
            if all(ask() for ask in is_cancelled):
                self.was_cancelled.set()
                break
        return super().predict_batch(inputs)
