"""`POST /v1/completions`: OpenAI's text completions over a `TextRunner`.

A prompt is a text or token ids; a list of prompts is a generation for each, and choice k of prompt
i has the index i * n + k.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlops.engine.fields import invalid
from mlops.engine.request import check_told_logprobs
from mlops.serving.http.host import RunnerHost
from mlops.serving.http.openai_logprobs import CompletionLogprobs
from mlops.serving.http.openai_text import (
    TextForm,
    TextQuestion,
    answer_text,
    as_json,
    common_fields,
    includes_usage,
)
from mlops.serving.http.schemas import MAX_PROMPTS, CompletionBody, parse
from mlops.serving.http.served import Served
from mlops.serving.runner.base import TextChunk


def parse_completion(body: Mapping[str, Any], base_names: frozenset[str]) -> TextQuestion:
    """Check what the runner does not.

    Args:
        body: the request's JSON object.
        base_names: what the served model is called; any other `model` is an adapter of it.

    Raises:
        InvalidRequestError: names the field.
    """
    asked = parse(CompletionBody, body)
    fields = common_fields(asked, base_names)
    fields["max_tokens"] = asked.max_tokens
    if asked.logprobs is not None:
        fields["logprobs"] = asked.logprobs
    prompts = _split(asked.prompt)
    check_told_logprobs(fields, len(prompts))
    several = [{**fields, "prompt": prompt} for prompt in prompts]
    return TextQuestion(
        asked.model,
        several[0] if len(several) == 1 else several,
        bool(asked.stream),
        includes_usage(asked),
    )


async def post_completions(served: Served, request: Request, body: dict[str, Any]) -> Response:
    """The endpoint."""
    question = parse_completion(body, served.info.model_names)
    form = CompletionForm(question, served.host)
    return await answer_text(served, request, body, question, form)


class CompletionForm(TextForm):
    """See `TextForm`."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, question: TextQuestion, host: RunnerHost) -> None:
        super().__init__(question, host)
        self._logprobs: defaultdict[int, CompletionLogprobs] = defaultdict(
            lambda: CompletionLogprobs(self._token_bytes)
        )

    def whole_choice(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of an answer in one piece."""
        text, told = choice["text"], choice.get("logprobs")
        return {
            "index": choice["index"],
            "text": text,
            "logprobs": None if told is None else self._logprobs[choice["index"]].add(told, text),
            "finish_reason": choice["finish_reason"],
        }

    def chunk_choices(self, chunk: TextChunk) -> Sequence[str]:
        """A chunk as the JSON texts of its choices."""
        told = "null"
        if chunk.logprobs:
            told = json.dumps(self._logprobs[chunk.index].add(chunk.logprobs, chunk.text))
        elif not chunk.text and not chunk.finish_reason:
            return ()
        return (
            f'{{"index": {chunk.index}, "text": {json.dumps(chunk.text)}, "logprobs": {told}, '
            f'"finish_reason": {as_json(chunk.finish_reason)}}}',
        )


def _split(prompt: Any) -> list[Any]:
    """The prompts of a request, each a text or a list of token ids; the engine looks into them.

    Raises:
        InvalidRequestError: it is neither, and no list of either.
    """
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return [prompt]
        kind = type(prompt[0])
        if (
            kind in (str, list)
            and len(prompt) <= MAX_PROMPTS
            and all(isinstance(one, kind) for one in prompt)
        ):
            return prompt
    raise invalid(
        "prompt", prompt, f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
    )
