"""What is known about one request: filled in by whoever handles it, read when it is over.

front (makes it) -> access (who asks) -> endpoint (what came of it) -> front (log, metrics, span)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

_KEY = "mlops.record"


@dataclass
class RequestRecord:
    """One request.

    Attributes:
        request_id: the client's `X-Request-Id`, or one of ours.
        route: the path of the route that answers it; "other" where none does.
        client: who asks: the fingerprint of an API key, or an address; "" where nobody looked.
        adapter: name of the adapter that it asked for; None is the base model.
        streamed: whether the answer comes in events.
        finish_reason: of its first choice.
        error: name of the class of what went wrong, in mid-stream too.
        prompt: what was asked, as JSON types; only where the operator wants it in the log.
        timings: `queue_ms`, `first_token_ms`, `total_ms` of the generation.
    """

    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    route: str = "other"
    client: str = ""
    adapter: str | None = None
    streamed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    prompt: Any = None
    timings: Mapping[str, float] = field(default_factory=dict)

    def note(self, prediction: Mapping[str, Any]) -> None:
        """Take over what a runner's whole answer says of itself; several prompts add up."""
        self.adapter = prediction.get("adapter")
        self.finish_reason = prediction.get("finish_reason")
        self.timings = prediction.get("timings") or {}
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
