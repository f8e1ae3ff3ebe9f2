"""What every runner offers, whatever library computes behind it.

A runner is the guide's in-process wrapper around one model: it is loaded once, asked many times and
unloaded. `serving.http` speaks to this Protocol alone, so a service does not know which library
answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

Prediction = dict[str, Any]
"""A runner's answer: `prediction` (the output), `mlx_optimized`, `model_type`, and for text also
`usage`, `finish_reason` and `adapter`."""


@runtime_checkable
class Runner(Protocol):
    """One loaded model. Methods may be called from any thread."""

    @property
    def is_loaded(self) -> bool:
        """True between a `load_model` that succeeded and the next `unload_model`."""
        ...

    def load_model(self) -> None:
        """Verify and load the weights. Does nothing when they are loaded.

        Raises:
            BentoMLError: the model is missing, damaged or not one this runner can serve.
        """
        ...

    def predict(self, input_data: str | Mapping[str, Any]) -> Prediction:
        """Answer one request; loads the model first when that has not been done.

        Raises:
            InvalidRequestError: a field is missing or out of range; names it.
            AdapterNotFoundError: the request names an adapter that is not there.
        """
        ...

    def predict_batch(
        self, inputs: Sequence[str | Mapping[str, Any]]
    ) -> list[Prediction | Exception]:
        """Answer several requests together, in their order; a bad one gets its own exception."""
        ...

    def get_memory_usage(self) -> dict[str, Any]:
        """`active_mb`, `cache_mb`, `total_mb`, `peak_mb` (MiB) and `mlx_available`."""
        ...

    def unload_model(self) -> None:
        """Give the memory back. Does nothing when no model is loaded."""
        ...
