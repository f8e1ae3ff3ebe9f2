"""What `/v1/completions` and `/v1/chat/completions` have in common: a request, and its answer.

    body -> TextQuestion -> RunnerHost -> TextForm -> JSON, or events of JSON

`model` names the base model or one of its adapters. Fields that this service does not have are
refused by name, not ignored. The one exception is `user`, which says who asked and changes no
answer: it is accepted and not used.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlops.errors import AdapterNotFoundError, EngineShutdownError, InvalidRequestError
from mlops.serving.http.errors import openai_describe
from mlops.serving.http.host import RunnerHost, TextStream
from mlops.serving.http.large_json import is_large, large_response
from mlops.serving.http.models import adapter_of, unknown_model
from mlops.serving.http.records import RequestRecord, record_of
from mlops.serving.http.schemas import Sampling, TextBody
from mlops.serving.http.served import Served
from mlops.serving.http.several import choices_of
from mlops.serving.http.sse import EventStream, stream_text
from mlops.serving.http.waiting import disconnection
from mlops.serving.runner.base import Prediction, TextChunk

SAMPLING_FIELDS = tuple(name for name in Sampling.model_fields if name != "stream")
"""Fields that the runner takes as they are, and that mean the same left out here and there; but
for the temperature, which is 1 here."""


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

    @property
    def adapter(self) -> str | None:
        """The adapter that the runner is asked for; None is the service's default."""
        first = self.fields if isinstance(self.fields, Mapping) else self.fields[0]
        name: str | None = first.get("adapter")
        return name


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
    """The form of one request's answers: what all of them have in common, and what they hold."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, question: TextQuestion, host: RunnerHost) -> None:
        self._host = host
        self._adapter = question.adapter
        self._common = {
            "id": f"{self.id_prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": question.model,
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

    def streamed(
        self, stream: TextStream, include_usage: bool, record: RequestRecord
    ) -> EventStream:
        """The answer to a request with `stream`: events for each chunk, then `[DONE]`."""
        # Events are made for every token of every client: only what differs is encoded.
        common = json.dumps({**self._common, "object": self.chunk_object})
        head = f'data: {common[:-1]}, "choices": ['
        end = '], "usage": null}\n\n' if include_usage else "]}\n\n"

        def of_chunk(chunk: TextChunk) -> str:
            return "".join([f"{head}{choice}{end}" for choice in self.chunk_choices(chunk)])

        def of_whole(prediction: Prediction) -> str:
            if not include_usage:
                return ""
            return f'{head}], "usage": {json.dumps(_usage(prediction["usage"]))}}}\n\n'

        return stream_text(
            stream, record, of_chunk=of_chunk, of_whole=of_whole, of_error=openai_describe
        )

    def _token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        runner = self._host.text_runner
        if runner is None:
            raise EngineShutdownError("the service is stopping")
        return runner.token_bytes(tokens, self._adapter)


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
            if is_large(prediction):
                return await large_response(lambda: form.whole(prediction))
            return JSONResponse(form.whole(prediction))
        stream = await served.host.stream(question.fields, disconnected)
    except AdapterNotFoundError as exc:
        raise unknown_model(question.model, exc) from exc
    record.adapter = question.adapter
    return form.streamed(stream, question.include_usage, record)


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
