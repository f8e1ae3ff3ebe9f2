"""One line of the log for each request, when it is over.

    front -> `RequestLog.add` -> (many at once, in a thread) -> the logger `mlops.requests`

A line goes to whatever handlers the process has. It is written shortly after its request, together
with others, so that no request waits for a file or a terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from mlops.serving.http.records import RequestRecord

LOGGER = "mlops.requests"
UNLOGGED_ROUTES = frozenset({"/livez", "/readyz", "/healthz", "/metrics", "/metrics/prometheus"})
"""Asked every few seconds by machines."""

WRITE_S = 0.1
"""How long a line waits for others at most."""

MAX_UNWRITTEN = 10_000
"""Lines that may wait; when nothing can be written for so long, the oldest are given up."""

MAX_CHARACTERS = 256
MAX_PROMPT_CHARACTERS = 16_384

_PLAIN = re.compile(r"[A-Za-z0-9_.:/@+*{}-]+")

logger = logging.getLogger(LOGGER)


class RequestLine:
    """What is told of one request; as text, `name=value` pairs on one line of ASCII.

    Whatever a client may have chosen is quoted as JSON unless it is plain, so that it cannot look
    like a field or a line of its own.

    Attributes:
        fields: in JSON types.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self._text: str | None = None

    def __str__(self) -> str:
        if self._text is None:  # every handler asks
            self._text = " ".join([f"{name}={_shown(one)}" for name, one in self.fields.items()])
        return self._text

    @property
    def summary(self) -> str:
        """What a person looks for first."""
        return " ".join([_shown(self.fields[name]) for name in ("method", "route", "status")])


class RequestLog:
    """Writes the lines. Until `writing` and after it, each at once."""

    def __init__(self) -> None:
        self._waiting: deque[logging.LogRecord] = deque()
        self._has_waiting: asyncio.Event | None = None
        self._num_given_up = 0

    def add(self, record: RequestRecord, path: str) -> None:
        """Take in a request that is over; called from the event loop.

        Args:
            path: as the client asked for it; told where no route answers it.
        """
        level = logging.WARNING if record.status >= 500 else logging.INFO
        if record.route in UNLOGGED_ROUTES or not logger.isEnabledFor(level):
            return
        line: Any = _line_of(record, path)
        log_record = logger.makeRecord(LOGGER, level, __file__, 0, line, (), None)
        if self._has_waiting is None:
            logger.handle(log_record)
            return
        if len(self._waiting) >= MAX_UNWRITTEN:
            self._waiting.popleft()
            self._num_given_up += 1
        self._waiting.append(log_record)
        self._has_waiting.set()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Write in the background; whatever is left at the end is written then."""
        self._has_waiting = asyncio.Event()
        task = asyncio.create_task(self._write_on(self._has_waiting))
        try:
            yield
        finally:
            self._has_waiting = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._write()

    async def _write_on(self, has_waiting: asyncio.Event) -> None:
        while True:
            await has_waiting.wait()
            await asyncio.sleep(WRITE_S)  # others come
            has_waiting.clear()
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        with contextlib.suppress(IndexError):  # none is left
            while True:
                logger.handle(self._waiting.popleft())
        if num_given_up := self._num_given_up:
            self._num_given_up = 0
            logger.warning("%d lines are missing: the log is too slow", num_given_up)


def _line_of(record: RequestRecord, path: str) -> RequestLine:
    line: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method[:MAX_CHARACTERS],
        "route": record.route,
        "status": record.status,
        "duration_ms": round(record.duration_s * 1000, 3),
    }
    if record.route == "other":
        line["path"] = path[:MAX_CHARACTERS]
    if record.client:
        line["client"] = record.client
    if adapter := record.adapter_label:
        line["adapter"] = adapter[:MAX_CHARACTERS]
    if record.streamed:
        line["streamed"] = True
    if record.prompt_tokens or record.completion_tokens:
        line["prompt_tokens"] = record.prompt_tokens
        line["completion_tokens"] = record.completion_tokens
    if record.finish_reason:
        line["finish_reason"] = record.finish_reason
    if record.timings:
        line.update(record.timings)
    if record.error:
        line["error"] = record.error
    if record.trace_id:
        line["trace_id"] = record.trace_id
    if record.prompt is not None:
        line["prompt"] = json.dumps(record.prompt)[:MAX_PROMPT_CHARACTERS]
    return RequestLine(line)


def _shown(value: Any) -> str:
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return json.dumps(value)
    return str(value)
