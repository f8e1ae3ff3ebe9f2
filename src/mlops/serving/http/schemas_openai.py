"""Answers of the routes that clients of OpenAI speak, as classes that the API is described by."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """What is not said here may be there as well: a runner or a later version adds to it."""

    model_config = ConfigDict(extra="allow", defer_build=True)


class PromptTokens(Answer):
    """More about the tokens of a prompt."""

    cached_tokens: int = Field(description="Those that an earlier request computed.")


class OpenAIUsage(Answer):
    """Tokens that a request took."""

    prompt_tokens: int = Field(description="Tokens of the prompts.")
    completion_tokens: int = Field(description="Tokens that were generated, of all choices.")
    total_tokens: int = Field(description="Both together.")
    prompt_tokens_details: PromptTokens | None = Field(
        None, description="More about the prompt's tokens."
    )


class CompletionLogprobs(Answer):
    """Log-probabilities of a choice's tokens; each list has an entry for each token."""

    tokens: list[str] = Field(description="Their texts.")
    token_logprobs: list[float] = Field(description="Their log-probabilities.")
    top_logprobs: list[dict[str, float]] = Field(
        description="Those of the likeliest tokens, by their texts."
    )
    text_offset: list[int] = Field(description="Where they begin, in characters of the text.")


class CompletionChoice(Answer):
    """A continuation."""

    index: int = Field(description="Choice k of prompt i has the index i * n + k.")
    text: str = Field(description="What was generated; in a stream, what follows.")
    logprobs: CompletionLogprobs | None = Field(description="When they were asked for.")
    finish_reason: FinishReason | None = Field(
        description="`stop`, or `length`: `max_tokens` or the model's context was reached. "
        "In a stream, null before the last."
    )


class CompletionAnswer(Answer):
    """The continuations of a text."""

    id: str = Field(description="`cmpl-` and 32 digits.")
    object: Literal["text_completion"] = Field(description="`text_completion`.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As in the request.")
    choices: list[CompletionChoice] = Field(description="The continuations.")
    usage: OpenAIUsage = Field(description="How many tokens it took.")


class CompletionChunk(Answer):
    """An event of a stream."""

    id: str = Field(description="The same in all events.")
    object: Literal["text_completion"] = Field(description="`text_completion`.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As in the request.")
    choices: list[CompletionChoice] = Field(
        description="One choice's next piece; empty in the event with the usage."
    )
    usage: OpenAIUsage | None = Field(
        None, description="In the last event, with `stream_options.include_usage`."
    )


class LikelyToken(Answer):
    """A token and its log-probability."""

    token: str = Field(description="Its text.")
    logprob: float = Field(description="Its log-probability; -9999 for none at all.")
    bytes: list[int] | None = Field(description="Its bytes, also where they are no text.")


class ChatToken(LikelyToken):
    """A token of an answer."""

    top_logprobs: list[LikelyToken] = Field(description="The likeliest tokens in its place.")


class ChatLogprobs(Answer):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatToken] | None = Field(description="An entry for each token.")
    refusal: None = Field(description="Always null.")


class AnsweredFunction(Answer):
    """A function to call."""

    name: str = Field(description="What it is called.")
    arguments: str = Field(description="What to call it with: the JSON text of an object.")


class AnsweredCall(Answer):
    """A call that the model wants."""

    id: str = Field(description="9 characters; the message with the result repeats them.")
    type: Literal["function"] = Field(description="`function`.")
    function: AnsweredFunction = Field(description="What to call.")


class AnsweredMessage(Answer):
    """The model's message."""

    role: Literal["assistant"] = Field(description="`assistant`.")
    content: str | None = Field(description="What it says; null where it only calls functions.")
    refusal: None = Field(description="Always null.")
    tool_calls: list[AnsweredCall] | None = Field(None, description="Functions to call.")


class ChatChoice(Answer):
    """An answer."""

    index: int = Field(description="Which of the choices, from 0.")
    message: AnsweredMessage = Field(description="The answer.")
    logprobs: ChatLogprobs | None = Field(description="When they were asked for.")
    finish_reason: FinishReason = Field(
        description="`stop`, `length` (`max_tokens` or the model's context was reached) or "
        "`tool_calls`."
    )


class ChatCompletionAnswer(Answer):
    """The next message of a conversation."""

    id: str = Field(description="`chatcmpl-` and 32 digits.")
    object: Literal["chat.completion"] = Field(description="`chat.completion`.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As in the request.")
    choices: list[ChatChoice] = Field(description="The answers.")
    usage: OpenAIUsage = Field(description="How many tokens it took.")


class CallPiece(AnsweredCall):
    """A call, whole."""

    index: int = Field(description="Which of the message's calls, from 0.")


class MessagePiece(Answer):
    """What is new of a message."""

    role: Literal["assistant"] | None = Field(None, description="In a choice's first event.")
    content: str | None = Field(None, description="What follows.")
    tool_calls: list[CallPiece] | None = Field(None, description="Further functions to call.")


class ChatPiece(Answer):
    """What is new of a choice."""

    index: int = Field(description="Which of the choices, from 0.")
    delta: MessagePiece = Field(description="What is new of its message.")
    logprobs: ChatLogprobs | None = Field(description="Of the new tokens, when asked for.")
    finish_reason: FinishReason | None = Field(description="Null before the choice's last event.")


class ChatCompletionChunk(Answer):
    """An event of a stream."""

    id: str = Field(description="The same in all events.")
    object: Literal["chat.completion.chunk"] = Field(description="`chat.completion.chunk`.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As in the request.")
    choices: list[ChatPiece] = Field(
        description="One choice's next piece; empty in the event with the usage."
    )
    usage: OpenAIUsage | None = Field(
        None, description="In the last event, with `stream_options.include_usage`."
    )


class ModelCard(Answer):
    """A model that a request may name."""

    id: str = Field(description="What `model` is set to.")
    object: Literal["model"] = Field(description="`model`.")
    created: int = Field(description="Seconds since 1970: when the service began.")
    owned_by: str = Field(description="The project.")
    root: str | None = Field(description="Where it comes from.")
    parent: str | None = Field(description="An adapter's base; null for a base model.")
    max_model_len: int | None = Field(
        description="Tokens that a prompt and its answer may have together."
    )


class ModelList(Answer):
    """The models that requests may name."""

    object: Literal["list"] = Field(description="`list`.")
    data: list[ModelCard] = Field(description="The base model and its adapters.")


class EmbeddingItem(Answer):
    """The embedding of one input."""

    object: Literal["embedding"] = Field(description="`embedding`.")
    index: int = Field(description="Which of the inputs, from 0.")
    embedding: list[float] | str = Field(
        description="The numbers, or Base64 of them as float32, lowest byte first."
    )


class EmbeddingUsage(Answer):
    """Tokens that a request took."""

    prompt_tokens: int = Field(description="Tokens of all inputs.")
    total_tokens: int = Field(description="The same.")


class EmbeddingAnswer(Answer):
    """Embeddings, in the order of the inputs."""

    object: Literal["list"] = Field(description="`list`.")
    data: list[EmbeddingItem] = Field(description="One for each input.")
    model: str = Field(description="As in the request.")
    usage: EmbeddingUsage = Field(description="How many tokens it took.")


class OpenAIErrorFact(Answer):
    """What went wrong."""

    message: str = Field(description="One sentence, for people.")
    type: str = Field(description="`invalid_request_error`, `rate_limit_error` or `server_error`.")
    param: str | None = Field(description="The field of the request that is wrong.")
    code: str | None = Field(
        description="Such as `model_not_found`, `context_length_exceeded`, `rate_limit_exceeded`, "
        "`invalid_api_key`."
    )


class OpenAIErrorAnswer(Answer):
    """Every failure below `/v1`."""

    error: OpenAIErrorFact = Field(description="What went wrong.")
