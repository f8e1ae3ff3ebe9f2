"""Server-sent events: a response that is written as it comes, and ends when nobody reads it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlops.errors import DeadlineExceededError
from mlops.serving.http.errors import log_failure
from mlops.serving.http.host import TextStream
from mlops.serving.http.large_json import PIECE, in_thread, is_large, pieces
from mlops.serving.http.records import RequestRecord
from mlops.serving.http.waiting import disconnection, while_wanted
from mlops.serving.runner.base import Prediction, TextChunk

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
GRACE_S = 10.0
"""After a request's deadline, for its last events to be read."""


class EventStream(Response):
    """Sends events until they end, the client leaves or the request's time is long over.

    Starlette's own streaming response waits for ever on a client that stays and does not read.

    Args:
        events: whole events in bytes; each is one write.
        release: called once, whatever happens, as soon as the response is over.
        deadline_s: of `time.monotonic()`; the request's time.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, release: Callable[[], None], deadline_s: float
    ) -> None:
        # The last header asks a reverse proxy not to collect what it passes on.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._release = release
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_wanted(
                self._write(send), disconnection(receive), self._deadline_s + GRACE_S
            )
        except ClientDisconnect:
            pass
        except DeadlineExceededError:
            # The server closes a connection whose response has no end.
            logger.warning("a client did not read its answer in time; its connection is closed")
        finally:
            self._release()

    async def _write(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def stream_text(
    stream: TextStream,
    record: RequestRecord,
    *,
    of_chunk: Callable[[TextChunk], str],
    of_whole: Callable[[Prediction], str],
    of_error: Callable[[Exception], Mapping[str, Any]],
) -> EventStream:
    """An answer whose text comes in events, and then `[DONE]`.

    An error ends it with an event that has `error` and nothing else, and without `[DONE]`.

    Args:
        of_chunk: the events of a chunk; "" for none.
        of_whole: the events at the end, of the whole answer; "" for none.
        of_error: the data of the event that tells of an error.
    """
    record.streamed = True

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in stream.chunks():
                record.completion_tokens += len(chunk.tokens)  # for a client that leaves
                for part in _parts(chunk):
                    if text := of_chunk(part):
                        yield text.encode("ascii")
            prediction = await stream.prediction()
            record.completion_tokens = 0
            record.note(prediction)
            if is_large(prediction):
                told = await in_thread(lambda: of_whole(prediction))
            else:
                told = of_whole(prediction)
            last = told.encode("ascii") + DONE
        except Exception as exc:  # the status has been sent: told in the stream
            record.error = type(exc).__name__
            log_failure(exc)
            last = event(of_error(exc)).encode("ascii")
        yield last

    return EventStream(events(), release=stream.cancel, deadline_s=stream.deadline_s)


def event(data: Mapping[str, Any]) -> str:
    """An event with this JSON, in ASCII."""
    text = "".join(pieces(data)) if is_large(data) else json.dumps(data, allow_nan=False)
    return f"data: {text}\n\n"


def _parts(chunk: TextChunk) -> Sequence[TextChunk]:
    """A chunk, which a slow reader gets of thousands of tokens, with few log-probabilities each.

    The first part has the text, the last one how it ended.
    """
    told = chunk.logprobs
    if told is None or len(told) <= PIECE:
        return (chunk,)
    parts = [
        TextChunk(chunk.index, "", logprobs=told[at : at + PIECE])
        for at in range(0, len(told), PIECE)
    ]
    parts[0] = replace(parts[0], text=chunk.text, tokens=chunk.tokens)
    parts[-1] = replace(parts[-1], finish_reason=chunk.finish_reason, tool_calls=chunk.tool_calls)
    return parts
