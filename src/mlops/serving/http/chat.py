"""`POST /v1/chat/completions`: OpenAI's chat completions over a `TextRunner`.

data: {…, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, …}]}
data: {…, "choices": [{"index": 0, "delta": {"content": "Hel"}, …}]}
data: {…, "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, …}]}, …}]}
data: {…, "choices": [{"index": 0, "delta": {}, …, "finish_reason": "tool_calls"}]}
data: [DONE]
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlops.errors import InvalidRequestError
from mlops.serving.http.host import RunnerHost
from mlops.serving.http.openai_logprobs import chat_content, chat_logprobs
from mlops.serving.http.openai_text import (
    TextForm,
    TextQuestion,
    answer_text,
    as_json,
    common_fields,
    includes_usage,
)
from mlops.serving.http.schemas import ChatCompletionBody, parse
from mlops.serving.http.served import Served
from mlops.serving.runner.base import TextChunk

CHAT_FIELDS = ("messages", "tools", "tool_choice", "parallel_tool_calls")
"""Further fields that the runner takes as they are."""


def parse_chat(body: Mapping[str, Any], base_names: frozenset[str]) -> TextQuestion:
    """Check what the runner does not.

    Args:
        body: the request's JSON object.
        base_names: what the served model is called; any other `model` is an adapter of it.

    Raises:
        InvalidRequestError: names the field.
    """
    asked = parse(ChatCompletionBody, body)
    given = asked.model_fields_set
    fields = common_fields(asked, base_names)
    fields |= {name: getattr(asked, name) for name in CHAT_FIELDS if name in given}
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise InvalidRequestError(
            "max_completion_tokens is the newer name of max_tokens: send one of them",
            "max_completion_tokens",
        )
    if (max_tokens := asked.max_tokens or asked.max_completion_tokens) is not None:
        fields["max_tokens"] = max_tokens
    if asked.logprobs:
        fields["logprobs"] = asked.top_logprobs or 0
    elif asked.top_logprobs is not None:
        raise InvalidRequestError("top_logprobs goes with logprobs: true only", "top_logprobs")
    return TextQuestion(asked.model, fields, bool(asked.stream), includes_usage(asked))


async def post_chat_completions(served: Served, request: Request, body: dict[str, Any]) -> Response:
    """The endpoint."""
    question = parse_chat(body, served.info.model_names)
    form = ChatForm(question, served.host)
    try:
        return await answer_text(served, request, body, question, form)
    except InvalidRequestError as exc:
        newer = "max_completion_tokens"
        if exc.field == "max_tokens" and body.get(newer) is not None:
            raise type(exc)(str(exc).replace("max_tokens", newer, 1), newer) from exc
        raise


class ChatForm(TextForm):
    """See `TextForm`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, question: TextQuestion, host: RunnerHost) -> None:
        super().__init__(question, host)
        self._begun: set[int] = set()  # choices of a stream
        self._num_calls: Counter[int] = Counter()

    def whole_choice(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of an answer in one piece."""
        calls, told = choice.get("tool_calls"), choice.get("logprobs")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice["text"] or (None if calls else ""),
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [_call(call["name"], call["arguments"]) for call in calls]
        logprobs = None
        if told is not None:  # written token by token: see `large_json`
            logprobs = {"content": chat_content(told, self._token_bytes), "refusal": None}
        return {
            "index": choice["index"],
            "message": message,
            "logprobs": logprobs,
            "finish_reason": choice["finish_reason"],
        }

    def chunk_choices(self, chunk: TextChunk) -> Sequence[str]:
        """A chunk as the JSON texts of its choices; the first ones have the role before it."""
        told = "null"
        if chunk.logprobs:
            told = json.dumps(chat_logprobs(chunk.logprobs, self._token_bytes))
        elif not chunk.text and not chunk.finish_reason and not chunk.tool_calls:
            return ()
        index = chunk.index
        delta = []
        if chunk.text:
            delta.append(f'"content": {json.dumps(chunk.text)}')
        if chunk.tool_calls:
            delta.append(f'"tool_calls": {json.dumps(self._next_calls(chunk))}')
        choice = (
            f'{{"index": {index}, "delta": {{{", ".join(delta)}}}, "logprobs": {told}, '
            f'"finish_reason": {as_json(chunk.finish_reason)}}}'
        )
        if index in self._begun:
            return (choice,)
        self._begun.add(index)
        role = '{"role": "assistant", "content": "", "refusal": null}'
        return (
            f'{{"index": {index}, "delta": {role}, "logprobs": null, "finish_reason": null}}',
            choice,
        )

    def _next_calls(self, chunk: TextChunk) -> list[dict[str, Any]]:
        first = self._num_calls[chunk.index]
        self._num_calls[chunk.index] += len(chunk.tool_calls)
        return [
            {"index": number, **_call(call.name, call.arguments)}
            for number, call in enumerate(chunk.tool_calls, first)
        ]


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex[:9],  # Mistral's templates take no other length
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
