"""`POST /predict`: the runner's own fields and answer; with `stream`, in events.

data: {"index": 0, "text": "Hel"}
data: {"index": 0, "text": "lo", "finish_reason": "length"}
data: {"prediction": "Hello", ..., "usage": {...}}      what an answer in one piece would be
data: [DONE]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlops.errors import InvalidRequestError
from mlops.serving.http.errors import describe
from mlops.serving.http.large_json import is_large, large_response
from mlops.serving.http.records import record_of
from mlops.serving.http.served import Served
from mlops.serving.http.sse import event, stream_text
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
        prediction = await predict(served, body, request)
        if is_large(prediction):
            return await large_response(lambda: prediction)
        return JSONResponse(prediction)
    names = served.info.names
    text_stream = await served.host.stream(body, disconnection(request.receive))
    record.adapter = body.get("adapter")
    return stream_text(
        text_stream,
        record,
        of_chunk=_chunk_event,
        of_whole=lambda prediction: event({**prediction, **names}),
        of_error=describe,
    )


def _chunk_event(chunk: TextChunk) -> str:
    if not (chunk.text or chunk.finish_reason or chunk.tool_calls):
        return ""
    shown: dict[str, Any] = {"index": chunk.index, "text": chunk.text}
    if chunk.finish_reason:
        shown["finish_reason"] = chunk.finish_reason
    if chunk.tool_calls:
        shown["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments} for call in chunk.tool_calls
        ]
    return event(shown)
