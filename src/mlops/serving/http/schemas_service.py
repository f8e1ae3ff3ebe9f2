"""The bodies of the service's own routes and of errors, as classes that the API is described by.

`/predict` is checked by the runner (`engine.parse_request`), which a custom runner does in its own
way. `PredictBody` says what a language model's runner takes; a test holds the two together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from mlops.engine.messages import MAX_MESSAGES, MAX_TOOLS
from mlops.engine.request import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGPROBS,
    MAX_TEMPERATURE,
    PROMPT_FIELDS,
)
from mlops.serving.http.schemas import Message, NamedTool, Sampling, Text, TokenIds, Tool
from mlops.serving.http.schemas_openai import Answer

Unset = SkipJsonSchema[None]
"""A field that may be left out, but not be null."""


def _one_prompt(schema: dict[str, Any]) -> None:
    """Exactly one of the prompt fields; unlike the others, they cannot be null."""
    schema["oneOf"] = [{"required": [name]} for name in PROMPT_FIELDS]


class PredictBody(Sampling):
    """What a language model is asked. Exactly one of `text`, `input`, `prompt` and `messages`."""

    model_config = ConfigDict(json_schema_extra=_one_prompt)

    text: Text | Unset = Field(
        None, description="What a user says, for a model that holds conversations."
    )
    input: Text | Unset = Field(None, description="The same as `text`.")
    prompt: Text | TokenIds | Unset = Field(
        None, description="A text, or the ids of its tokens, that the model continues as it is."
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | Unset = (
        Field(None, description="The conversation so far.")
    )
    adapter: Text | None = Field(
        None,
        description="Name of an adapter; `base`, or null here, is the base model. Left out, it "
        "is the adapter that the service was made from, if it was.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description=f"The most tokens to generate for an answer; {DEFAULT_MAX_TOKENS}, or what "
        "the model's context has room for, when left out.",
    )
    temperature: float | None = Field(
        0.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the likeliest token."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell each token's log-probability, and those of so many of the likeliest.",
    )
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call; with `messages` only."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Whether it calls one: `auto` lets it decide; an object names which."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether an answer may have more than one call; true when left out."
    )


class CustomPredictBody(BaseModel):
    """What a custom model's runner takes."""

    model_config = ConfigDict(extra="allow")


class Usage(Answer):
    """Tokens that a request took."""

    prompt_tokens: int = Field(description="Tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens that were generated, of all choices.")
    total_tokens: int = Field(description="Both together.")
    cached_tokens: int = Field(description="Tokens of the prompt that an earlier request computed.")


class Timings(Answer):
    """Milliseconds since the request was submitted."""

    queue_ms: float = Field(description="Until the request was begun.")
    first_token_ms: float = Field(description="Until its first token.")
    total_ms: float = Field(description="Until its last.")


class PredictChoice(Answer):
    """One of several answers."""

    index: int = Field(description="Which of them, from 0.")
    text: str = Field(description="What was generated.")
    finish_reason: str = Field(description="As of the answer.")


class CustomPredictAnswer(Answer):
    """What a custom model computed."""

    prediction: Any = Field(description="The model's output.")
    mlx_optimized: bool = Field(description="Whether MLX computed it.")
    model_type: str = Field(description="`mlx`, `lora` or `custom`.")
    service_name: str = Field(description="What the service is called.")
    project_name: str = Field(description="Whose it is.")


class PredictAnswer(CustomPredictAnswer):
    """What a language model generated."""

    prediction: str = Field(description="The text; of the first choice where there are several.")
    finish_reason: str = Field(
        description="`stop` (the model or a stop text ended it), `length` (`max_tokens` or the "
        "model's context did) or `tool_calls`."
    )
    adapter: str | None = Field(description="Which adapter answered; null is the base model.")
    usage: Usage = Field(description="How many tokens it took.")
    timings: Timings = Field(description="How long it took.")
    choices: list[PredictChoice] | None = Field(None, description="All answers, with `n` above 1.")
    logprobs: list[dict[str, Any]] | None = Field(
        None, description="An entry for each token, when it was asked for."
    )
    tool_calls: list[dict[str, Any]] | None = Field(
        None, description="Functions to call, each with `name` and `arguments` (JSON text)."
    )


class PredictChunk(Answer):
    """An event of a stream; the last before `[DONE]` is what an answer in one piece would be."""

    index: int = Field(description="Which of the choices, from 0.")
    text: str = Field(description="What follows its text so far.")
    finish_reason: str | None = Field(None, description="In a choice's last event.")
    tool_calls: list[dict[str, Any]] | None = Field(
        None, description="Calls of functions that are complete: `name` and `arguments`."
    )


class ErrorFact(Answer):
    """What went wrong."""

    type: str = Field(description="The kind of error, for programs.")
    message: str = Field(description="One sentence, for people.")
    field: str | None = Field(None, description="The field of the request that is wrong.")
    retry_after_s: float | None = Field(
        None, description="With 429: seconds after which another try makes sense."
    )


class ErrorAnswer(Answer):
    """Every failure outside of `/v1`."""

    error: ErrorFact = Field(description="What went wrong.")


class HealthAnswer(Answer):
    """What the service says of itself; facts of the model and the machine once it is loaded."""

    status: str = Field(description="`healthy`; else `loading`, `unhealthy` or `stopped`, and 503.")
    service_name: str = Field(description="What the service is called.")
    project_name: str = Field(description="Whose it is.")
    model_loaded: bool = Field(description="Whether the model is in memory.")
    memory_usage_mb: float = Field(description="Memory of this process that MLX uses, in MiB.")
    mlx_available: bool = Field(description="Whether MLX can be used.")
    model_type: str = Field(description="`mlx`, `lora` or `custom`.")
    model_tag: str | None = Field(description="The model in the store.")
    digest: str | None = Field(description="Digest of its content.")
    adapters: list[str] | None = Field(None, description="Adapters that a request can name.")
    missing_adapters: dict[str, str] | None = Field(
        None,
        description="Adapters that were loaded at run time and could not be loaded again when the "
        "worker was restarted, each with the reason.",
    )
    default_adapter: str | None = Field(None, description="The one of requests that name none.")
    architecture: str | None = Field(None, description="Such as `llama`.")
    device: str | None = Field(None, description="Where the model computes.")
    layout: str | None = Field(None, description="How its weights are held.")
    batched: bool | None = Field(None, description="Whether requests share the model's steps.")
    context_tokens: int | None = Field(
        None, description="Tokens that a prompt and its answer may have together."
    )
    hardware: dict[str, Any] | None = Field(None, description="Chip, cores, MLX's device, BLAS.")
    notes: list[str] | None = Field(None, description="Settings that this machine cannot honour.")
    error: ErrorFact | None = Field(None, description="Why the model could not be loaded.")


class Memory(Answer):
    """Memory that MLX uses in the answering process, in MiB."""

    active_mb: float = Field(description="In arrays.")
    cache_mb: float = Field(description="In freed buffers that are kept for reuse.")
    total_mb: float = Field(description="Both.")
    peak_mb: float = Field(description="The most that was ever active.")
    mlx_available: bool = Field(description="Whether MLX can be used.")


class MetricsAnswer(Answer):
    """Figures of the answering process."""

    service_name: str = Field(description="What the service is called.")
    project_name: str = Field(description="Whose it is.")
    model_loaded: bool = Field(description="Whether the model is in memory.")
    memory_usage: Memory = Field(description="What it holds.")
    process_id: int = Field(description="Which process answers.")
    uptime_s: float = Field(description="Seconds since it began.")
    requests_by_status: dict[str, int] = Field(description="Answers so far.")
    requests_running: int = Field(description="In the running batch.")
    requests_waiting: int = Field(description="Waiting for a place in it, or for the model.")
    batches_by_size: dict[str, int] = Field(description="Steps, or batches, by their size.")
    engine: dict[str, Any] | None = Field(None, description="A language model's further figures.")
