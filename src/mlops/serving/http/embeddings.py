"""`POST /v1/embeddings`: OpenAI's embeddings over an `EmbeddingRunner`.

    body -> EmbeddingBody -> RunnerHost -> the runner's vectors -> JSON, vector by vector

Two thousand vectors are tens of megabytes of JSON: beyond a size the answer is written as it is
read, and never stands in memory as a whole.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlops.engine import EmbeddingResult
from mlops.errors import AdapterNotFoundError, EngineError
from mlops.serving.http.models import adapter_of, unknown_model
from mlops.serving.http.records import record_of
from mlops.serving.http.schemas import EmbeddingBody, parse
from mlops.serving.http.served import Served
from mlops.serving.http.sse import EventStream
from mlops.serving.http.waiting import disconnection
from mlops.serving.runner.base import EmbeddingRunner, Runner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_NUMBERS_AT_ONCE = 65_536
"""An answer of more numbers than these is written piece by piece."""

UNSUPPORTED = {
    "error": {
        "message": "the model of this service gives no embeddings: serve one that is made for "
        "them, with the files of sentence-transformers (modules.json) beside its weights",
        "type": "invalid_request_error",
        "param": "model",
        "code": "unsupported",
    }
}


class PiecewiseJSON(EventStream):
    """JSON that is written as it is made; a client that does not read it is left."""

    media_type = "application/json"


async def post_embeddings(served: Served, request: Request, body: dict[str, Any]) -> Response:
    """The endpoint."""
    asked = parse(EmbeddingBody, body)
    record = record_of(request.scope)
    if served.settings.log_prompts:
        record.prompt = body
    adapter = adapter_of(asked.model, served.info.model_names).get("adapter")

    async def embed(runner: Runner, deadline_s: float) -> tuple[EmbeddingResult, float] | None:
        if not isinstance(runner, EmbeddingRunner) or not runner.can_embed:
            return None
        future = runner.embed(
            asked.input, adapter=adapter, dimensions=asked.dimensions, deadline_s=deadline_s
        )
        return await asyncio.wrap_future(future), deadline_s

    try:
        answer = await served.host.ask(embed, disconnection(request.receive))
    except AdapterNotFoundError as exc:
        raise unknown_model(asked.model, exc) from exc
    if answer is None:
        record.error = "Unsupported"
        return JSONResponse(UNSUPPORTED, 400)
    result, deadline_s = answer
    vectors = _checked(result.vectors)
    record.note({"adapter": result.adapter, "usage": {"prompt_tokens": result.prompt_tokens}})
    pieces = _pieces(asked, vectors, result.prompt_tokens)
    if vectors.size <= MAX_NUMBERS_AT_ONCE:
        return Response(b"".join(pieces), media_type="application/json")
    return PiecewiseJSON(_one_by_one(pieces), release=lambda: None, deadline_s=deadline_s)


def _checked(vectors: Any) -> NDArray[np.float32]:
    """The vectors of any runner as little-endian float32, (texts, dimensions)."""
    import numpy as np

    array = np.asarray(vectors, dtype="<f4")
    if array.ndim != 2 or not np.isfinite(array).all():
        raise EngineError(f"the runner's embeddings of the shape {array.shape} are not finite rows")
    return array


def _pieces(
    asked: EmbeddingBody, vectors: NDArray[np.float32], prompt_tokens: int
) -> Iterator[bytes]:
    start = '{"object": "list", "data": ['
    for index, vector in enumerate(vectors):
        if asked.encoding_format == "base64":
            embedding = f'"{base64.b64encode(vector.tobytes()).decode("ascii")}"'
        else:
            embedding = json.dumps(vector.tolist(), allow_nan=False)
        yield (
            f'{start}{{"object": "embedding", "index": {index}, "embedding": {embedding}}}'
        ).encode("ascii")
        start = ", "
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    yield f'], "model": {json.dumps(asked.model)}, "usage": {json.dumps(usage)}}}'.encode("ascii")


async def _one_by_one(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)  # a fast reader would keep the event loop for itself
