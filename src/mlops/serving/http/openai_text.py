"""What `/v1/completions` and `/v1/chat/completions` have in common: a request, and its answer.

    body -> TextQuestion -> RunnerHost -> TextForm -> JSON, or events of JSON

`model` names the base model or one of its adapters. Fields that this service does not have are
refused by name, not ignored. The one exception is `user`, which says who asked and changes no
answer: it is accepted and not used.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlops.errors import AdapterNotFoundError, EngineShutdownError, InvalidRequestError
from mlops.serving.http.errors import log_failure, openai_describe
from mlops.serving.http.host import RunnerHost, TextStream
from mlops.serving.http.models import adapter_of, unknown_model
from mlops.serving.http.records import RequestRecord, record_of
from mlops.serving.http.schemas import TextBody
from mlops.serving.http.served import Served
from mlops.serving.http.several import choices_of
from mlops.serving.http.sse import DONE, EventStream
from mlops.serving.http.waiting import disconnection
from mlops.serving.runner.base import Prediction, TextChunk

SAMPLING_FIELDS = (
    "n",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "response_format",
)
"""Fields that the runner takes as they are, and that mean the same left out here and there."""


@dataclass(frozen=True)
class TextQuestion:
    """A checked body.

    Attributes:
        model: as the client said it; the answer repeats it.
        fields: what the runner is asked; for several prompts, one for each.
        stream: whether the answer comes in events.
        include_usage: whether a stream ends with the number of tokens.
    """

    model: str
    fields: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    stream: bool = False
    include_usage: bool = False


def common_fields(body: TextBody, base_names: frozenset[str]) -> dict[str, Any]:
    """What the runner is asked, without the prompt and how long the answer may be.

    Raises:
        InvalidRequestError: two fields contradict each other.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options goes with stream: true only", "stream_options")
    given = body.model_fields_set
    return {
        "temperature": body.temperature,
        **{name: getattr(body, name) for name in SAMPLING_FIELDS if name in given},
        **adapter_of(body.model, base_names),
    }


def includes_usage(body: TextBody) -> bool:
    """Whether a stream ends with the number of tokens."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


class TextForm(ABC):
    """The form of one request's answers: what all of them have in common, and what they hold.

    Args:
        model: as the client said it.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, host: RunnerHost) -> None:
        self._host = host
        self._common = {
            "id": f"{self.id_prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def whole_choice(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of an answer in one piece; `choice` is one of `choices_of`."""

    @abstractmethod
    def chunk_choices(self, chunk: TextChunk) -> Sequence[str]:
        """A chunk as JSON texts of choices, each of them an event's; none where it says nothing."""

    def whole(self, prediction: Prediction) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        return {
            **self._common,
            "object": self.whole_object,
            "choices": [self.whole_choice(choice) for choice in choices_of(prediction)],
            "usage": _usage(prediction["usage"]),
        }

    async def events(
        self, stream: TextStream, include_usage: bool, record: RequestRecord
    ) -> AsyncGenerator[bytes, None]:
        """The answer to a request with `stream`: events for each chunk, then `[DONE]`.

        An error ends it with an event that has `error` and nothing else, and without `[DONE]`.
        """
        # Events are made for every token of every client: only what differs is encoded.
        common = json.dumps({**self._common, "object": self.chunk_object})
        head = f'data: {common[:-1]}, "choices": ['
        end = '], "usage": null}\n\n' if include_usage else "]}\n\n"
        try:
            async for chunk in stream.chunks():
                if choices := self.chunk_choices(chunk):
                    yield "".join([f"{head}{choice}{end}" for choice in choices]).encode("ascii")
            prediction = await stream.prediction()
            record.note(prediction)
            last = DONE
            if include_usage:
                usage = json.dumps(_usage(prediction["usage"]))
                last = f'{head}], "usage": {usage}}}\n\n'.encode("ascii") + DONE
        except Exception as exc:  # the status has been sent: told in the stream
            record.error = type(exc).__name__
            log_failure(exc)
            last = f"data: {json.dumps(openai_describe(exc))}\n\n".encode("ascii")
        yield last

    def _token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        runner = self._host.text_runner
        if runner is None:
            raise EngineShutdownError("the service is stopping")
        return runner.token_bytes(tokens)


async def answer_text(
    served: Served,
    request: Request,
    body: Mapping[str, Any],
    question: TextQuestion,
    form: TextForm,
) -> Response:
    """Ask the runner and answer in this form.

    Raises:
        MLOpsError, ClientDisconnect: see `RunnerHost.predict`.
    """
    record = record_of(request.scope)
    if served.settings.log_prompts:
        record.prompt = body
    disconnected = disconnection(request.receive)
    try:
        if not question.stream:
            prediction = await served.host.predict(question.fields, disconnected, text_only=True)
            record.note(prediction)
            if "logprobs" in prediction:  # of many choices, megabytes: not in the event loop
                return await asyncio.to_thread(lambda: JSONResponse(form.whole(prediction)))
            return JSONResponse(form.whole(prediction))
        stream = await served.host.stream(question.fields, disconnected)
    except AdapterNotFoundError as exc:
        raise unknown_model(question.model, exc) from exc
    record.streamed = True
    return EventStream(
        form.events(stream, question.include_usage, record),
        release=stream.cancel,
        deadline_s=stream.deadline_s,
    )


def as_json(reason: str | None) -> str:
    """A finish reason as JSON text."""
    return f'"{reason}"' if reason else "null"


def _usage(counted: Mapping[str, Any]) -> dict[str, Any]:
    """The runner's `usage` in OpenAI's form."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = {name: counted[name] for name in names}
    if "cached_tokens" in counted:
        usage["prompt_tokens_details"] = {"cached_tokens": counted["cached_tokens"]}
    return usage
