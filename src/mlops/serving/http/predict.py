"""`POST /predict`: the runner's own fields and answer; with `stream`, in events.

data: {"index": 0, "text": "Hel"}
data: {"index": 0, "text": "lo", "finish_reason": "length"}
data: {"prediction": "Hello", ..., "usage": {...}}      what an answer in one piece would be
data: [DONE]
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlops.errors import InvalidRequestError
from mlops.serving.http.errors import describe, log_failure
from mlops.serving.http.host import TextStream
from mlops.serving.http.records import RequestRecord, record_of
from mlops.serving.http.served import Served
from mlops.serving.http.sse import DONE, EventStream
from mlops.serving.http.waiting import disconnection
from mlops.serving.runner.base import Prediction, TextChunk


async def predict(
    served: Served, input_data: Mapping[str, Any], request: Request | None = None
) -> Prediction:
    """Answer one request: the runner's prediction and the names of the service.

    Raises:
        MLOpsError, ClientDisconnect: see `RunnerHost.predict`.
    """
    disconnected = disconnection(request.receive) if request else None
    prediction = await served.host.predict(input_data, disconnected)
    if request:
        record_of(request.scope).note(prediction)
    return {**prediction, **served.info.names}


async def post_predict(served: Served, request: Request, body: dict[str, Any]) -> Response:
    """The endpoint."""
    record = record_of(request.scope)
    if served.settings.log_prompts:
        record.prompt = body
    stream = body.pop("stream", None)
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequestError("stream must be true or false", "stream")
    if not stream:
        return JSONResponse(await predict(served, body, request))
    text_stream = await served.host.stream(body, disconnection(request.receive))
    record.streamed = True
    return EventStream(
        _events(text_stream, served.info.names, record),
        release=text_stream.cancel,
        deadline_s=text_stream.deadline_s,
    )


async def _events(
    stream: TextStream, names: Mapping[str, str], record: RequestRecord
) -> AsyncGenerator[bytes, None]:
    """An error ends the events with one that has `error` and nothing else, and no `[DONE]`."""
    try:
        async for chunk in stream.chunks():
            if chunk.text or chunk.finish_reason or chunk.tool_calls:
                yield _event(_shown(chunk))
        prediction = await stream.prediction()
        record.note(prediction)
        last = _event({**prediction, **names}) + DONE
    except Exception as exc:  # the status has been sent: told in the stream
        record.error = type(exc).__name__
        log_failure(exc)
        last = _event(describe(exc))
    yield last


def _shown(chunk: TextChunk) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": chunk.index, "text": chunk.text}
    if chunk.finish_reason:
        shown["finish_reason"] = chunk.finish_reason
    if chunk.tool_calls:
        shown["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments} for call in chunk.tool_calls
        ]
    return shown


def _event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, allow_nan=False)}\n\n".encode("ascii")
