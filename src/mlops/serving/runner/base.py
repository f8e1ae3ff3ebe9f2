"""What every runner offers, whatever library computes behind it.

A runner is the guide's in-process wrapper around one model: it is loaded once, asked many times and
unloaded. `serving.http` speaks to these Protocols alone, so a service does not know which library
answers. A `TextRunner` takes each request on its own and says its text as it comes; any other
`Runner` answers batches.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mlops.engine import EmbeddingResult
from mlops.engine.tools import ToolCall

Prediction = dict[str, Any]
"""A runner's answer: `prediction` (the output), `mlx_optimized`, `model_type`, and for text also
`usage`, `finish_reason` and `adapter`. A request for several choices has them in `choices`, each
with `index`, `text` and `finish_reason`; `prediction` is the first one's text. An answer that calls
functions, and each such choice, has `tool_calls`: a list of `name` and `arguments` (JSON text)."""


@dataclass(frozen=True)
class TextChunk:
    """A piece of text of one choice.

    Attributes:
        index: which of the request's choices, from 0.
        text: what follows the choice's text so far; may be empty in its last chunk.
        tokens: the ids that became this text.
        finish_reason: `stop` or `length` in the choice's last chunk, None before.
        logprobs: one entry for each token, when the request asked for them.
        tool_calls: complete calls of the functions that the request offers.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[Any, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class Generating(Protocol):
    """One request under way, with one choice or several."""

    def cancel(self) -> None:
        """End it at the next step. From any thread, any number of times, also when it is over."""
        ...

    async def begun(self) -> None:
        """Return once it is accepted: its prompt is prepared, and it waits for its turn or runs.

        Raises:
            MLOpsError: it is refused; as `chunks`.
        """
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
    """One loaded model. Methods may be called from any thread.

    A runner that can tell that it will never answer again has a `fatal_error` besides, of type
    `str | None`: while it is a text, `/health` says so and the process is restarted.
    """

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

    def token_bytes(self, token_ids: Sequence[int], adapter: str | None = None) -> list[bytes]:
        """Each token's own bytes, which may be a part of a character; for log-probabilities.

        Cheap, from any thread. A special token is its text.

        Args:
            adapter: as the request named it, whose tokenizer may be its own; None is the service's
                default.

        Raises:
            EngineShutdownError: the model is not loaded.
        """
        ...

    def statistics(self) -> dict[str, Any]:
        """Counters in JSON types; cheap, from any thread. {} when no model is loaded.

        Among them `running` and `waiting` (requests now) and `batch_sizes` (steps by rows).
        """
        ...


@runtime_checkable
class EmbeddingRunner(Runner, Protocol):
    """A runner that makes vectors of texts."""

    @property
    def can_embed(self) -> bool:
        """True when `embed` answers; known once the model is loaded."""
        ...

    def embed(
        self,
        inputs: Any,
        *,
        adapter: str | None = None,
        dimensions: int | None = None,
        deadline_s: float | None = None,
    ) -> Future[EmbeddingResult]:
        """Begin to make vectors of texts. Does not block: the event loop may call it.

        Args:
            inputs: a text, token ids, or a list of either, unchecked.
            adapter: name of an adapter; None is the service's default, `"base"` the bare base.
            dimensions: cut the vectors to so many numbers.
            deadline_s: of `time.monotonic()`; later the request fails.

        Returns:
            A future with the result or the error; to cancel it is to give the request up.

        Raises:
            EngineShutdownError: the model is not loaded.
        """
        ...


@runtime_checkable
class AdapterRunner(Runner, Protocol):
    """A runner whose adapters can be changed while it runs."""

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names that requests may use; () when no model is loaded."""
        ...

    def add_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Verify, check and load an adapter; blocks until requests can use it.

        Args:
            path: a folder, or a text as the registry takes it.
            replace: a name that is there may mean the new one from now on; requests under way
                finish with the old one.

        Raises:
            InvalidRequestError: the name cannot be used, or is there already.
            BentoMLError: it is missing, damaged, or belongs to another base model.
            EngineError: there is no room for it.
        """
        ...

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way finish with it.

        Raises:
            AdapterNotFoundError: there is none of this name.
            InvalidRequestError: it is what the service was made from.
        """
        ...
