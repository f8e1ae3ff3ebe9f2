"""Bodies that clients of OpenAI's API send, as classes: checked against them, described by them.

Here the fields of a body are checked one by one. What is inside a prompt, a conversation, a tool or
a format, the engine checks when it reads the request (`engine.parse_request`), in sentences of the
same kind; here it is only described.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    StringConstraints,
    ValidationError,
)

from mlops.engine.embedding import MAX_INPUTS
from mlops.engine.fields import (
    MAX_BIAS,
    MAX_BIASED_TOKENS,
    MAX_PROMPT_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    MAX_TOKEN_ID,
    invalid,
    show,
)
from mlops.engine.messages import MAX_CALLS, MAX_MESSAGES, MAX_TOOLS, NAME
from mlops.engine.request import (
    DEFAULT_MAX_TOKENS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
)
from mlops.errors import InvalidRequestError

MAX_PROMPTS = 64
DEFAULT_COMPLETION_TOKENS = 16

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenDigits = Annotated[str, StringConstraints(pattern="^(0|[1-9][0-9]{0,9})$")]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Text = Annotated[str, StringConstraints(min_length=1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
FunctionName = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]


class _Body(BaseModel):
    # Built when the first request comes, not at import.
    model_config = ConfigDict(strict=True, extra="forbid", defer_build=True)


Body = TypeVar("Body", bound=_Body)


class StreamOptions(_Body):
    """How a stream is sent."""

    include_usage: bool | None = Field(
        None, description="End the stream with an event that counts the tokens."
    )


class TextFormat(_Body):
    """Any text."""

    type: Literal["text"] = Field(description="`text`.")


class JsonObjectFormat(_Body):
    """A JSON object."""

    type: Literal["json_object"] = Field(description="`json_object`.")


class JsonSchema(_Body):
    """What a JSON text must look like."""

    name: FunctionName = Field(description="What the format is called.")
    description: str | None = Field(None, description="What it is for; changes nothing.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")
    strict: bool | None = Field(None, description="The schema is kept in any case.")


class JsonSchemaFormat(_Body):
    """A JSON text that a schema allows."""

    type: Literal["json_schema"] = Field(description="`json_schema`.")
    json_schema: JsonSchema = Field(description="The schema and its name.")


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class Sampling(_Body):
    """How a text is generated; `/predict` has these fields too."""

    n: int | None = Field(1, ge=1, le=MAX_CHOICES, description="Answers to the same prompt.")
    temperature: float | None = Field(
        1.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the likeliest token."
    )
    top_p: float | None = Field(
        1.0, gt=0, le=1, description="Only the likeliest tokens that together are this probable."
    )
    top_k: int | None = Field(
        0, ge=0, description="Only so many of the likeliest tokens; 0 is all of them."
    )
    min_p: float | None = Field(
        0.0,
        ge=0,
        le=1,
        description="Only tokens at least this share as likely as the likeliest one.",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="The same seed gives the same text."
    )
    presence_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="Subtracted from the logit of a token that the answer has."
    )
    frequency_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="The same, as often as the answer has the token."
    )
    repetition_penalty: float | None = Field(
        1.0,
        gt=0,
        le=MAX_REPETITION_PENALTY,
        description="Above 1, tokens of prompt and answer become less likely.",
    )
    logit_bias: SkipValidation[
        Annotated[
            dict[TokenDigits, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
            Field(max_length=MAX_BIASED_TOKENS),
        ]
        | None
    ] = Field(None, description="What is added to the logits of tokens, by their ids.")
    stop: SkipValidation[
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None
    ] = Field(None, description="The answer ends before the first of these texts.")
    stop_token_ids: SkipValidation[
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None
    ] = Field(None, description="The answer ends at the first of these tokens.")
    ignore_eos: bool | None = Field(
        False, description="The model's own end token does not end the answer."
    )
    response_format: SkipValidation[ResponseFormat | None] = Field(
        None, description="Make the answer JSON, of any kind or as a schema says."
    )
    stream: bool | None = Field(False, description="Answer in events, as the text comes.")


class TextBody(Sampling):
    """What requests of OpenAI's clients for text have in common."""

    model: Text = Field(
        description="The served model, or one of its adapters: `adapter` or `base:adapter`."
    )
    stream_options: StreamOptions | None = Field(
        None, description="How a stream is sent; goes with `stream` only."
    )
    user: str | None = Field(None, description="Who asks; changes no answer and is not used.")


class CompletionBody(TextBody):
    """A text to be continued. Beside OpenAI's fields there are some of vLLM's."""

    prompt: SkipValidation[
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    ] = Field(description="A text, the ids of its tokens, or several of either: each is continued.")
    max_tokens: int | None = Field(
        DEFAULT_COMPLETION_TOKENS, ge=1, description="The most tokens to generate for an answer."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell each token's log-probability, and those of so many of the likeliest.",
    )


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"] = Field(description="`text`.")
    text: str = Field(description="The text.")


class CalledFunction(_Body):
    """A function, and what it was called with."""

    name: Text = Field(description="What the function is called.")
    arguments: str = Field(description="The JSON text of an object.")


class MessageCall(_Body):
    """A call that the model made earlier."""

    id: Text = Field(description="As the answer had it.")
    type: Literal["function"] = Field(description="`function`.")
    function: CalledFunction = Field(description="What was called.")


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who says it."
    )
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = Field(
        None, description="What is said; may be left out where there are `tool_calls`."
    )
    name: Text | None = Field(None, description="What the speaker is called.")
    tool_calls: Annotated[list[MessageCall], Field(min_length=1, max_length=MAX_CALLS)] | None = (
        Field(None, description="Functions that the assistant has called.")
    )
    tool_call_id: Text | None = Field(
        None, description="Which call a message of the role `tool` answers."
    )


class OfferedFunction(_Body):
    """A function that the model may call."""

    name: FunctionName = Field(description="What the function is called.")
    description: str | None = Field(None, description="What it is for; the model is told.")
    parameters: dict[str, Any] | None = Field(
        None, description="The JSON schema of its arguments, of the type `object`."
    )
    strict: bool | None = Field(None, description="Whether the schema must be kept.")


class Tool(_Body):
    """Something that the model may use."""

    type: Literal["function"] = Field(description="`function`.")
    function: OfferedFunction = Field(description="The function.")


class NamedFunction(_Body):
    """One of the functions."""

    name: Text = Field(description="What the function is called.")


class NamedTool(_Body):
    """The function that the model must call."""

    type: Literal["function"] = Field(description="`function`.")
    function: NamedFunction = Field(description="Which one.")


class ChatCompletionBody(TextBody):
    """A conversation to be continued. Beside OpenAI's fields there are some of vLLM's."""

    messages: SkipValidation[
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    ] = Field(description="The conversation so far.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description=f"The most tokens to generate for an answer; {DEFAULT_MAX_TOKENS}, or what "
        "the model's context has room for, when left out.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The newer name of `max_tokens`."
    )
    logprobs: bool | None = Field(False, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Also those of so many of the likeliest tokens; goes with `logprobs` only.",
    )
    tools: SkipValidation[
        Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None
    ] = Field(None, description="Functions that the model may call.")
    tool_choice: SkipValidation[Literal["none", "auto", "required"] | NamedTool | None] = Field(
        None, description="Whether it calls one: `auto` lets it decide; an object names which."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether an answer may have more than one call; true when left out."
    )


class EmbeddingBody(_Body):
    """Texts to be made vectors."""

    model: Text = Field(
        description="The served model, or one of its adapters: `adapter` or `base:adapter`."
    )
    input: SkipValidation[
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    ] = Field(description="A text, the ids of its tokens, or several of either.")
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="Numbers, or base64 of little-endian float32."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Cut each vector to so many numbers, at most as many as it has."
    )
    user: str | None = Field(None, description="Who asks; changes no answer and is not used.")


class LoadLoraAdapterBody(_Body):
    """An adapter to be served from now on."""

    lora_name: Text = Field(description="What requests will call it; other than the model's names.")
    lora_path: Text = Field(
        description="Where it is: a tag of the model store, `name:version`, or a folder below the "
        "one that the operator has allowed."
    )
    load_inplace: bool | None = Field(
        False, description="Replace the adapter that has this name, if there is one."
    )


class UnloadLoraAdapterBody(_Body):
    """An adapter that is served no more."""

    lora_name: Text = Field(description="What requests call it.")
    lora_int_id: None = Field(None, description="Must be null: adapters have names here.")


def parse(kind: type[Body], body: Mapping[str, Any]) -> Body:
    """Check a request's body. A field that is null is a field left out.

    Raises:
        InvalidRequestError: says of the first field that is wrong what it must be.
    """
    _check_names(kind, body)
    given = {name: value for name, value in body.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_context=False)[0]
        raise _to_sentence(kind, error["loc"], error["type"], error["input"]) from exc


def _check_names(kind: type[_Body], given: Mapping[str, Any], path: str = "") -> None:
    """Refuse unknown fields, before pydantic makes an error of each of a hundred thousand."""
    fields = _fields(kind)
    for name, value in given.items():
        if name not in fields and value is not None:
            raise InvalidRequestError(
                f"unknown field {show(path + name)}; allowed are "
                f"{', '.join(path + field for field in fields)}",
                path + name[:64],
            )
        inner = fields.get(name)
        if inner is not None and isinstance(value, Mapping):
            _check_names(inner, value, f"{path}{name}.")


@functools.cache
def _fields(kind: type[_Body]) -> Mapping[str, type[_Body] | None]:
    """The names of a class's fields, and the class of those that hold another checked body."""
    return {name: _inner(field.annotation) for name, field in kind.model_fields.items()}


def _inner(annotation: Any) -> type[_Body] | None:
    kinds = [one for one in get_args(annotation) if one is not type(None)]
    is_optional = get_origin(annotation) in (Union, UnionType) and len(kinds) == 1
    kind = kinds[0] if is_optional else annotation
    return kind if isinstance(kind, type) and issubclass(kind, _Body) else None


def _to_sentence(
    kind: type[_Body], location: Sequence[int | str], error: str, value: object
) -> InvalidRequestError:
    """The error of one field, in the words of `engine.fields`."""
    path = [part for part in location if isinstance(part, str)]
    whole = _schema(kind)
    schema = whole
    known: list[str] = []
    for part in path:
        inner = _resolve(whole, schema).get("properties", {})
        if part not in inner:  # the rest says which member of a union it is
            break
        schema = inner[part]
        known.append(part)
    name = ".".join(known)
    if error == "missing":
        return InvalidRequestError(f"{name} is missing: {schema['description']}", name)
    return invalid(name, value, _describe(whole, schema))


@functools.cache
def _schema(kind: type[_Body]) -> Mapping[str, Any]:
    return kind.model_json_schema()


def _resolve(whole: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself, of a reference and of one that may also be null."""
    options = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if len(options) == 1:
        schema = options[0]
    if "$ref" in schema:
        found: Mapping[str, Any] = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def _describe(whole: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    schema = _resolve(whole, schema)
    if allowed := schema.get("enum"):
        return f"one of {', '.join(map(str, allowed))}"
    if options := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_describe(whole, one) for one in options))
    kind = schema.get("type", "object")
    if kind in ("integer", "number"):
        return _describe_number(schema)
    if kind == "string" and schema.get("minLength"):
        return "a text that is not empty"
    return {"string": "a text", "boolean": "true or false", "null": "null"}.get(kind, f"an {kind}")


def _describe_number(schema: Mapping[str, Any]) -> str:
    kind = "an integer" if schema["type"] == "integer" else "a number"
    low, high = _digits(schema.get("minimum")), _digits(schema.get("maximum"))
    if above := _digits(schema.get("exclusiveMinimum")):
        return f"{kind} above {above}" + (f", at most {high}" if high else "")
    return kind + (f" from {low}" if low else "") + (f" to {high}" if high else "")


def _digits(limit: float | None) -> str:
    if limit is None:
        return ""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"
