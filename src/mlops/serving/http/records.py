"""What is known about one request: filled in by whoever handles it, read when it is over.

front (makes it) -> access (who asks) -> endpoint (what came of it) -> front (log, metrics, span)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from mlops.engine import BASE_NAME

_KEY = "mlops.record"


@dataclass(slots=True)
class RequestRecord:
    """One request.

    Attributes:
        request_id: the client's `X-Request-Id`, or one of ours.
        started_s: of `time.monotonic()`.
        method: of HTTP.
        route: the path of the route that answers it; "other" where none does.
        status: what came of it: the answer's status; 499 when the client left before its end; for
            a stream that failed, the status that the error would have had before it began.
        duration_s: until its last byte was handed to the server.
        client: who asks: the fingerprint of an API key, or an address; "" where nobody looked.
        adapter: name of the adapter that it asked for; None is the base model.
        streamed: whether the answer comes in events.
        num_choices: texts that the answer has.
        finish_reason: of its first choice.
        error: name of the class of what went wrong, in mid-stream too.
        prompt: what was asked, as JSON types; only where the operator wants it in the log.
        trace_id: of its span, in hexadecimal; None where nothing is traced.
        timings: `queue_ms`, `first_token_ms`, `total_ms` of the generation.
        is_elsewhere: another replica answers it, and counts and logs it.
    """

    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    method: str = ""
    route: str = "other"
    status: int = 0
    duration_s: float = 0.0
    client: str = ""
    adapter: str | None = None
    streamed: bool = False
    num_choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    prompt: Any = None
    trace_id: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    is_elsewhere: bool = False

    @property
    def adapter_label(self) -> str:
        """The adapter by name, "base" for the base model, "" where no text was asked for."""
        return self.adapter or (BASE_NAME if self.finish_reason else "")

    @property
    def time_per_token_ms(self) -> float | None:
        """Between two tokens of one choice, after the first; None where there are not two."""
        first_ms, total_ms = self.timings.get("first_token_ms"), self.timings.get("total_ms")
        num_later = self.completion_tokens / max(1, self.num_choices) - 1
        if first_ms is None or total_ms is None or num_later <= 0:
            return None
        return max(0.0, total_ms - first_ms) / num_later

    def note(self, prediction: Mapping[str, Any]) -> None:
        """Take over what a runner's whole answer says of itself; several prompts add up."""
        self.adapter = prediction.get("adapter")
        self.finish_reason = prediction.get("finish_reason")
        self.timings = prediction.get("timings") or {}
        self.num_choices += len(prediction.get("choices") or (None,))
        usage = prediction.get("usage") or {}
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.completion_tokens += usage.get("completion_tokens", 0)

    def put_into(self, scope: MutableMapping[str, Any]) -> None:
        """Let those who handle this ASGI scope find it."""
        scope[_KEY] = self


def record_of(scope: Mapping[str, Any]) -> RequestRecord:
    """The record of the request of this ASGI scope; an empty one where nobody keeps any."""
    record = scope.get(_KEY)
    return record if isinstance(record, RequestRecord) else RequestRecord(request_id="")
