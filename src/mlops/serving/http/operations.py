"""The routes as people read about them: what each is for, takes, answers, and an example of both.

A test holds this table and the app's routes together. `openapi` makes the description of the API
from it, with the fields of the bodies from their classes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from mlops.serving.http import schemas, schemas_openai
from mlops.serving.http import schemas_service as service


class Offer(enum.Enum):
    """What one service has and another lacks."""

    TEXT = "a model that generates text"
    CUSTOM = "a custom model"
    EMBEDDINGS = "a model that gives embeddings"
    METRICS = "the setting `enable_metrics`, which is on by default"
    RUNTIME_ADAPTERS = "the setting `http.enable_runtime_adapters`, which is off by default"


INTRODUCTION = """\
Text generation with a base model and any number of adapters, over HTTP.

Bodies are JSON. In a request, a field that is null is a field left out (but for `adapter` of \
`/predict`); a field that is not listed is refused by name, never ignored.

A failure has a status of its own and a JSON body that names the field and the reason: below `/v1` \
in the form of OpenAI's API, elsewhere `{"error": {"type", "message", …}}`. A method that is not \
listed is answered with 405.

A stream is `text/event-stream`: each event is a line `data: ` with JSON, and the last one is \
`data: [DONE]`. When something goes wrong in mid-stream, an event with `error` ends it instead."""

TAGS = {
    "Prediction": "The service's own route.",
    "OpenAI": "What OpenAI's clients speak.",
    "Adapters": "Adapters that come and go while the service runs.",
    "Monitoring": "What the service says of itself.",
}

STATUS_MEANINGS = {
    400: "The body is not JSON; below `/v1` also: a field is missing or out of range.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or adapter.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The `Content-Type` is not `application/json`.",
    422: "A field is missing or out of range.",
    429: "Too many requests wait, or this client's limit is reached.",
    499: "The client has left; nobody sees this but a proxy or a log.",
    500: "The service failed; its log says why.",
    503: "The model is not ready, or the service is ending.",
    504: "There was no answer within the service's time limit.",
}
"""Every status of a failure, with what it means on any route."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one route.

    Attributes:
        name: in client code that is made from the description.
        needs: what a service must have for it.
        is_open: whether it needs no API key even where others do.
        examples: of the body, by what they show; the first stands in docs/api.md.
        answer_text: what a good answer is.
        answer: the class of a JSON answer.
        events: the classes of a stream's events, as far as nothing goes wrong.
        texts: an example of each form of an answer that is not JSON, by media type.
        also: statuses whose answer has the form of a good one, and what they mean.
        parameters: of the path: what each is, and an example.
        failures: statuses of `STATUS_MEANINGS` besides those of its kind.
    """

    name: str
    path: str
    tag: str
    summary: str
    description: str
    answer_text: str
    method: str = "post"
    needs: frozenset[Offer] = frozenset()
    is_open: bool = False
    like_openai: bool = False
    body: type[BaseModel] | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)
    answer: type[BaseModel] | None = None
    example_answer: Any = None
    events: tuple[type[BaseModel], ...] = ()
    example_events: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[int, str] = field(default_factory=dict)
    parameters: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    failures: frozenset[int] = frozenset()

    def is_offered(self, offers: frozenset[Offer]) -> bool:
        """Whether a service that has `offers` has this."""
        return self.needs <= offers

    @property
    def error(self) -> type[BaseModel]:
        """The class of its failures, and of the event that ends a stream early."""
        if self.like_openai:
            return schemas_openai.OpenAIErrorAnswer
        return service.ErrorAnswer

    def statuses(self, *, has_keys: bool) -> set[int]:
        """The failures that it can answer with."""
        found = {500, *self.failures}
        if not self.is_open:
            found |= {401, 429} if has_keys else {429}
        if self.body is not None:
            found |= {400, 408, 413, 415, 499, 503, 504}
            if not self.like_openai:
                found.add(422)
        return found - set(self.also)


_NAMES = {"service_name": "my_service", "project_name": "default"}
_PREDICTION = {
    "prediction": "Hello! How can I help you?",
    "mlx_optimized": True,
    "model_type": "mlx",
    "usage": {
        "prompt_tokens": 11,
        "completion_tokens": 20,
        "total_tokens": 31,
        "cached_tokens": 0,
    },
    "finish_reason": "length",
    "adapter": None,
    "timings": {"queue_ms": 0.4, "first_token_ms": 12.3, "total_ms": 145.6},
    **_NAMES,
}

_DIGITS = "0123456789abcdef0123456789abcdef"
_USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 10,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_CARD = {
    "id": "my_service",
    "object": "model",
    "created": 1795000000,
    "owned_by": "default",
    "root": "my_model",
    "parent": None,
    "max_model_len": 1024,
}
_PROMETHEUS = """\
# HELP mlops_num_requests_running Requests that are being computed.
# TYPE mlops_num_requests_running gauge
mlops_num_requests_running 3.0
"""

OPERATIONS = (
    Operation(
        name="predict",
        path="/predict",
        tag="Prediction",
        summary="Generate text",
        description="Ask the base model or an adapter, with all sampling fields. With `stream`, "
        "the text comes in events as it is generated; the last event before `[DONE]` is what an "
        "answer in one piece would be.",
        needs=frozenset({Offer.TEXT}),
        body=service.PredictBody,
        examples={
            "text": {"text": "Say hello.", "max_tokens": 20, "temperature": 0.7},
            "adapter": {"text": "Say hello.", "max_tokens": 20, "adapter": "support"},
            "conversation": {
                "messages": [
                    {"role": "system", "content": "Answer in one sentence."},
                    {"role": "user", "content": "What is MLX?"},
                ],
                "max_tokens": 20,
            },
            "stream": {"text": "Say hello.", "max_tokens": 20, "stream": True},
        },
        answer_text="The text that was generated.",
        answer=service.PredictAnswer,
        example_answer=_PREDICTION,
        events=(service.PredictChunk, service.PredictAnswer),
        example_events='data: {"index": 0, "text": "Hel"}\n\n'
        'data: {"index": 0, "text": "lo!", "finish_reason": "length"}\n\n'
        'data: {"prediction": "Hello!", "finish_reason": "length"}\n\n'
        "data: [DONE]\n\n",
        failures=frozenset({404}),
    ),
    Operation(
        name="predict",
        path="/predict",
        tag="Prediction",
        summary="Ask the model",
        description="The fields are those that the model's runner takes.",
        needs=frozenset({Offer.CUSTOM}),
        body=service.CustomPredictBody,
        examples={"input": {"input": [1.0, 2.0]}},
        answer_text="What the model computed.",
        answer=service.CustomPredictAnswer,
        example_answer={
            "prediction": [0.1, 0.9],
            "mlx_optimized": True,
            "model_type": "custom",
            **_NAMES,
        },
        failures=frozenset({404}),
    ),
    Operation(
        name="create_completion",
        path="/v1/completions",
        tag="OpenAI",
        summary="Continue a text",
        description="`model` is the served model or one of its adapters. Of OpenAI's fields, those "
        "that are not listed are refused by name.",
        needs=frozenset({Offer.TEXT}),
        like_openai=True,
        body=schemas.CompletionBody,
        examples={
            "text": {"model": "my_service", "prompt": "Hello", "max_tokens": 10},
            "adapter": {"model": "support", "prompt": "Hello", "max_tokens": 10},
            "prompts": {"model": "my_service", "prompt": ["Hello", "Good"], "max_tokens": 10},
            "stream": {"model": "my_service", "prompt": "Hello", "max_tokens": 5, "stream": True},
        },
        answer_text="The continuations.",
        answer=schemas_openai.CompletionAnswer,
        example_answer={
            "id": f"cmpl-{_DIGITS}",
            "object": "text_completion",
            "created": 1795000000,
            "model": "my_service",
            "choices": [
                {"index": 0, "text": ", how are you", "logprobs": None, "finish_reason": "length"}
            ],
            "usage": _USAGE,
        },
        events=(schemas_openai.CompletionChunk,),
        example_events=f'data: {{"id": "cmpl-{_DIGITS}", "created": 1795000000, '
        '"model": "my_service", "object": "text_completion", "choices": [{"index": 0, '
        '"text": ", how", "logprobs": null, "finish_reason": null}]}\n\ndata: [DONE]\n\n',
        failures=frozenset({404}),
    ),
    Operation(
        name="create_chat_completion",
        path="/v1/chat/completions",
        tag="OpenAI",
        summary="Continue a conversation",
        description="The model's chat template makes a prompt of the messages. `response_format` "
        "makes the answer JSON that a schema allows; `tools` are functions that the model may "
        "call, where its template knows them.",
        needs=frozenset({Offer.TEXT}),
        like_openai=True,
        body=schemas.ChatCompletionBody,
        examples={
            "question": {
                "model": "my_service",
                "messages": [{"role": "user", "content": "What is MLX?"}],
                "max_tokens": 20,
            },
            "JSON": {
                "model": "my_service",
                "messages": [{"role": "user", "content": "Name a colour."}],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "colour",
                        "schema": {
                            "type": "object",
                            "properties": {"colour": {"enum": ["red", "green", "blue"]}},
                            "required": ["colour"],
                            "additionalProperties": False,
                        },
                    },
                },
            },
            "tools": {
                "model": "my_service",
                "messages": [{"role": "user", "content": "How is the weather in Bonn?"}],
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "get_weather",
                            "description": "The weather in a town.",
                            "parameters": {
                                "type": "object",
                                "properties": {"town": {"type": "string"}},
                                "required": ["town"],
                            },
                        },
                    }
                ],
            },
            "stream": {
                "model": "my_service",
                "messages": [{"role": "user", "content": "What is MLX?"}],
                "max_tokens": 5,
                "stream": True,
            },
        },
        answer_text="The next message, or several of which one may be chosen.",
        answer=schemas_openai.ChatCompletionAnswer,
        example_answer={
            "id": f"chatcmpl-{_DIGITS}",
            "object": "chat.completion",
            "created": 1795000000,
            "model": "my_service",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "An array framework.",
                        "refusal": None,
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _USAGE,
        },
        events=(schemas_openai.ChatCompletionChunk,),
        example_events=f'data: {{"id": "chatcmpl-{_DIGITS}", "created": 1795000000, '
        '"model": "my_service", "object": "chat.completion.chunk", "choices": [{"index": 0, '
        '"delta": {"content": "An"}, "logprobs": null, "finish_reason": null}]}\n\n'
        "data: [DONE]\n\n",
        failures=frozenset({404}),
    ),
    Operation(
        name="create_embedding",
        path="/v1/embeddings",
        tag="OpenAI",
        summary="Texts as vectors",
        description="A model that generates text only answers 400 with the code `unsupported`.",
        needs=frozenset({Offer.EMBEDDINGS}),
        like_openai=True,
        body=schemas.EmbeddingBody,
        examples={
            "text": {"model": "my_service", "input": "Hello"},
            "texts": {
                "model": "my_service",
                "input": ["Hello", "Good morning"],
                "encoding_format": "base64",
            },
        },
        answer_text="The vectors.",
        answer=schemas_openai.EmbeddingAnswer,
        example_answer={
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
            "model": "my_service",
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
        },
        failures=frozenset({404}),
    ),
    Operation(
        name="list_models",
        path="/v1/models",
        method="get",
        tag="OpenAI",
        summary="The models that requests may name",
        description="The base model, and every adapter with the base as its `parent`.",
        like_openai=True,
        answer_text="Their cards.",
        answer=schemas_openai.ModelList,
        example_answer={"object": "list", "data": [_CARD]},
    ),
    Operation(
        name="retrieve_model",
        path="/v1/models/{id}",
        method="get",
        tag="OpenAI",
        summary="One of the models",
        description="By any of the names that `model` may have.",
        parameters={"id": ("The model's name, such as `support` or `base:support`.", "support")},
        like_openai=True,
        answer_text="Its card.",
        answer=schemas_openai.ModelCard,
        example_answer={**_CARD, "id": "support", "root": "support", "parent": "my_service"},
        failures=frozenset({404}),
    ),
    Operation(
        name="load_lora_adapter",
        path="/v1/load_lora_adapter",
        tag="Adapters",
        summary="Serve another adapter",
        description="From the model store, by its tag, or from below the operator's "
        "`http.adapter_folder`. It is verified, and has to fit the base model.",
        needs=frozenset({Offer.RUNTIME_ADAPTERS}),
        like_openai=True,
        body=schemas.LoadLoraAdapterBody,
        examples={"folder": {"lora_name": "final", "lora_path": "final"}},
        answer_text="Requests may name it.",
        texts={"text/plain": "Success: LoRA adapter 'final' added successfully."},
    ),
    Operation(
        name="unload_lora_adapter",
        path="/v1/unload_lora_adapter",
        tag="Adapters",
        summary="Serve an adapter no more",
        description="Requests under way finish with it.",
        needs=frozenset({Offer.RUNTIME_ADAPTERS}),
        like_openai=True,
        body=schemas.UnloadLoraAdapterBody,
        examples={"name": {"lora_name": "final"}},
        answer_text="Requests cannot name it any more.",
        texts={"text/plain": "Success: LoRA adapter 'final' removed successfully."},
        failures=frozenset({404}),
    ),
    Operation(
        name="get_health",
        path="/health",
        method="get",
        tag="Monitoring",
        summary="Whether the service works, and what it is",
        description="Never waits for the model, and needs no API key.",
        is_open=True,
        answer_text="The model is loaded.",
        answer=service.HealthAnswer,
        example_answer={
            "status": "healthy",
            **_NAMES,
            "model_loaded": True,
            "memory_usage_mb": 210.5,
            "mlx_available": True,
            "model_type": "mlx",
            "model_tag": None,
            "digest": None,
            "adapters": ["support"],
        },
        also={503: "The model is loading, or could not be loaded."},
    ),
    Operation(
        name="get_metrics",
        path="/metrics",
        method="get",
        tag="Monitoring",
        summary="Figures, as JSON or for Prometheus",
        description="JSON, unless `Accept` asks for `text/plain` (Prometheus) or "
        "`application/openmetrics-text`.",
        needs=frozenset({Offer.METRICS}),
        answer_text="The figures.",
        answer=service.MetricsAnswer,
        example_answer={
            **_NAMES,
            "memory_usage": {
                "active_mb": 200.5,
                "cache_mb": 10.0,
                "total_mb": 210.5,
                "peak_mb": 250.0,
                "mlx_available": True,
            },
            "model_loaded": True,
            "process_id": 4711,
            "uptime_s": 62.5,
            "requests_by_status": {"200": 12},
            "requests_running": 0,
            "requests_waiting": 0,
            "batches_by_size": {"1": 20},
        },
        texts={
            "text/plain": _PROMETHEUS,
            "application/openmetrics-text": f"{_PROMETHEUS}# EOF\n",
        },
    ),
    Operation(
        name="get_prometheus_metrics",
        path="/metrics/prometheus",
        method="get",
        tag="Monitoring",
        summary="Figures for Prometheus",
        description="As text whatever `Accept` says; OpenMetrics where it asks for that.",
        needs=frozenset({Offer.METRICS}),
        answer_text="The figures.",
        texts={
            "text/plain": _PROMETHEUS,
            "application/openmetrics-text": f"{_PROMETHEUS}# EOF\n",
        },
    ),
    Operation(
        name="get_livez",
        path="/livez",
        method="get",
        tag="Monitoring",
        summary="Whether the process lives",
        description="For a supervisor; needs no API key.",
        is_open=True,
        answer_text="It does.",
        texts={"text/plain": "\n"},
    ),
    Operation(
        name="get_readyz",
        path="/readyz",
        method="get",
        tag="Monitoring",
        summary="Whether requests are welcome",
        description="For a load balancer; needs no API key.",
        is_open=True,
        answer_text="The model is loaded.",
        texts={"text/plain": "\n"},
        also={503: "The model is loading, or the service is ending."},
    ),
)
