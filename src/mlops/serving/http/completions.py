"""`POST /v1/completions`: OpenAI's text completions over a `TextRunner`.

    body -> `parse_completion` -> CompletionRequest -> RunnerHost -> JSON, or events of JSON

`model` names the base model or one of its adapters. Fields that this service does not have are
refused by name, not ignored; a field that is null is a field left out. The one exception is `user`,
which says who asked and changes no answer: it is accepted and not used.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlops.engine import BASE_NAME
from mlops.errors import AdapterNotFoundError, InvalidRequestError
from mlops.serving.http.errors import log_failure, openai_describe
from mlops.serving.http.host import TextStream
from mlops.serving.http.records import record_of
from mlops.serving.http.served import Served
from mlops.serving.http.sse import DONE, EventStream
from mlops.serving.http.waiting import disconnection
from mlops.serving.runner.base import Prediction, TextChunk

DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
RUNNER_FIELDS = (
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
"""Fields that the runner takes, and checks, as they are."""

FIELDS = ("model", *RUNNER_FIELDS, "stream", "stream_options", "user")


@dataclass(frozen=True)
class CompletionRequest:
    """A checked body.

    Attributes:
        model: as the client said it; the answer repeats it.
        fields: what the runner is asked.
        stream: whether the answer comes in events.
        include_usage: whether a stream ends with the number of tokens.
    """

    model: str
    fields: Mapping[str, Any]
    stream: bool = False
    include_usage: bool = False


def parse_completion(body: Mapping[str, Any], base_names: Collection[str]) -> CompletionRequest:
    """Check what the runner does not.

    Args:
        body: the request's JSON object.
        base_names: what the served model is called; any other `model` is an adapter of it.

    Raises:
        InvalidRequestError: names the field.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in FIELDS:
            raise InvalidRequestError(
                f"unknown field {name[:64]!r}; allowed are {', '.join(FIELDS)}", name[:64]
            )
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("model must name the model or one of its adapters", "model")
    if "prompt" not in given:
        raise InvalidRequestError("prompt must be a text or a list of token ids", "prompt")
    if not isinstance(given.get("user", ""), str):
        raise InvalidRequestError("user must be a text", "user")
    stream = given.get("stream", False)
    if not isinstance(stream, bool):
        raise InvalidRequestError("stream must be true or false", "stream")
    fields = {
        "max_tokens": DEFAULT_MAX_TOKENS,
        "temperature": DEFAULT_TEMPERATURE,
        **{name: given[name] for name in RUNNER_FIELDS if name in given},
        **_adapter_of(model, base_names),
    }
    return CompletionRequest(model, fields, stream, _include_usage(given, stream))


async def post_completions(served: Served, request: Request, body: dict[str, Any]) -> Response:
    """The endpoint."""
    asked = parse_completion(body, served.info.model_names)
    disconnected = disconnection(request.receive)
    form = CompletionAnswer(asked.model)
    try:
        if not asked.stream:
            prediction = await served.host.predict(asked.fields, disconnected, text_only=True)
            record_of(request.scope).note(prediction)
            return JSONResponse(form.whole(prediction))
        stream = await served.host.stream(asked.fields, disconnected)
    except AdapterNotFoundError as exc:
        raise unknown_model(exc, asked.model) from exc
    return EventStream(
        form.events(stream, asked.include_usage),
        release=stream.cancel,
        deadline_s=stream.deadline_s,
    )


@dataclass(frozen=True)
class CompletionAnswer:
    """The form of one request's answers: what all of them have in common."""

    model: str
    identifier: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, prediction: Prediction) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        choices = prediction.get("choices") or [
            {
                "index": 0,
                "text": prediction["prediction"],
                "finish_reason": prediction["finish_reason"],
            }
        ]
        return {
            **self._head,
            "choices": [
                {
                    "index": choice["index"],
                    "text": choice["text"],
                    "logprobs": None,
                    "finish_reason": choice["finish_reason"],
                }
                for choice in choices
            ],
            "usage": _usage(prediction["usage"]),
        }

    async def events(self, stream: TextStream, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """The answer to a request with `stream`: an event for each chunk, then `[DONE]`.

        An error ends it with an event that has `error` and nothing else, and without `[DONE]`.
        """
        # An event is made for every token of every client, so only what differs is encoded.
        head = f"data: {json.dumps(self._head)[:-1]}"
        end = ', "usage": null}\n\n' if include_usage else "}\n\n"
        try:
            async for chunk in stream.chunks():
                if chunk.text or chunk.finish_reason:
                    yield f'{head}, "choices": [{_choice(chunk)}]{end}'.encode("ascii")
            last = DONE
            if include_usage:
                usage = json.dumps(_usage((await stream.prediction())["usage"]))
                last = f'{head}, "choices": [], "usage": {usage}}}\n\n'.encode("ascii") + DONE
        except Exception as exc:  # the status has been sent: told in the stream
            log_failure(exc)
            last = f"data: {json.dumps(openai_describe(exc))}\n\n".encode("ascii")
        yield last

    @property
    def _head(self) -> dict[str, Any]:
        return {
            "id": self.identifier,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


def unknown_model(exc: AdapterNotFoundError, model: str) -> AdapterNotFoundError:
    """The runner's error about an adapter in the words of a client that asked for a model."""
    return AdapterNotFoundError(f"the model {model[:80]!r} does not exist: {exc}")


def _choice(chunk: TextChunk) -> str:
    reason = f'"{chunk.finish_reason}"' if chunk.finish_reason else "null"
    return (
        f'{{"index": {chunk.index}, "text": {json.dumps(chunk.text)}, "logprobs": null, '
        f'"finish_reason": {reason}}}'
    )


def _usage(counted: Mapping[str, Any]) -> dict[str, Any]:
    """The runner's `usage` in OpenAI's form."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = {name: counted[name] for name in names}
    if "cached_tokens" in counted:
        usage["prompt_tokens_details"] = {"cached_tokens": counted["cached_tokens"]}
    return usage


def _adapter_of(model: str, base_names: Collection[str]) -> dict[str, str]:
    """The runner's field `adapter`, left out where the service's own default is meant."""
    if model in base_names:
        return {}
    for name in sorted((BASE_NAME, *base_names), key=len, reverse=True):  # a tag has a colon too
        adapter = model.removeprefix(f"{name}:")
        if adapter and adapter != model:
            return {"adapter": adapter}
    return {"adapter": model}


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise InvalidRequestError("stream_options goes with stream: true only", "stream_options")
    if not isinstance(options, Mapping) or set(options) - {"include_usage"}:
        raise InvalidRequestError(
            "stream_options must be an object with include_usage and nothing else", "stream_options"
        )
    include_usage = options.get("include_usage")
    if include_usage is not None and not isinstance(include_usage, bool):
        raise InvalidRequestError(
            "stream_options.include_usage must be true or false", "stream_options.include_usage"
        )
    return bool(include_usage)
