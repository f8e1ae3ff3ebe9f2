"""What every runner offers, whatever library computes behind it.

A runner is the guide's in-process wrapper around one model: it is loaded once, asked many times and
unloaded. `serving.http` speaks to these Protocols alone, so a service does not know which library
answers. A `TextRunner` takes each request on its own and says its text as it comes; any other
`Runner` answers batches.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Prediction = dict[str, Any]
"""A runner's answer: `prediction` (the output), `mlx_optimized`, `model_type`, and for text also
`usage`, `finish_reason` and `adapter`. A request for several choices has them in `choices`, each
with `index`, `text` and `finish_reason`; `prediction` is the first one's text."""


@dataclass(frozen=True)
class TextChunk:
    """A piece of text of one choice.

    Attributes:
        index: which of the request's choices, from 0.
        text: what follows the choice's text so far; may be empty in its last chunk.
        tokens: the ids that became this text.
        finish_reason: `stop` or `length` in the choice's last chunk, None before.
        logprobs: one entry for each token, when the request asked for them.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[Any, ...] | None = None


class Generating(Protocol):
    """One request under way, with one choice or several."""

    def cancel(self) -> None:
        """End it at the next step. From any thread, any number of times, also when it is over."""
        ...

    def chunks(self) -> AsyncIterator[TextChunk]:
        """Every piece of text as it comes; ends after the last choice's last chunk.

        Called at most once. What came since the reader last asked is one chunk for each choice, so
        a slow reader holds nobody up and no more than its text.

        Raises:
            InvalidRequestError, AdapterNotFoundError: found when the request was prepared.
            DeadlineExceededError: its time is over.
            EngineError: the generation failed.
        """
        ...

    async def prediction(self) -> Prediction:
        """The whole answer; raises what `chunks` does. Also after `chunks` has ended, for `usage`.

        With it alone nobody is woken before the answer is complete.
        """
        ...


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


@runtime_checkable
class TextRunner(Runner, Protocol):
    """A runner whose requests share the steps of one running batch."""

    @property
    def can_generate(self) -> bool:
        """True when `generate` answers; False makes this a plain `Runner`.

        For a class that generates text and a subclass of it that computes something else.
        """
        ...

    def generate(
        self, input_data: Mapping[str, Any], *, deadline_s: float | None = None
    ) -> Generating:
        """Begin to answer one request. Does not block: the event loop may call it.

        Args:
            input_data: the request's fields.
            deadline_s: of `time.monotonic()`; later the request fails.

        Raises:
            QueueFullError: too many requests wait.
            EngineShutdownError: the model is not loaded, or is being unloaded.
            InvalidRequestError: what can be told without work; the `Generating` raises the rest.
        """
        ...

    def statistics(self) -> dict[str, Any]:
        """Counters in JSON types; cheap, from any thread. {} when no model is loaded.

        Among them `running` and `waiting` (requests now) and `batch_sizes` (steps by rows).
        """
        ...
