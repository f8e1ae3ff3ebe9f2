"""From a client's request to token ids: the chat template, the tokenizer and the model's limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlops.counts import count
from mlops.engine.guidance import json_grammar, lark_grammar
from mlops.engine.request import DEFAULT_MAX_TOKENS, GenerationRequest, TextRequest
from mlops.engine.response_format import FIELD as RESPONSE_FORMAT
from mlops.engine.tool_grammar import call_grammar
from mlops.engine.tools import ToolForm, find_form
from mlops.errors import InvalidRequestError, PromptTooLongError

if TYPE_CHECKING:
    from mlops.engine.loading import LoadedModel


def to_generation_request(
    loaded: LoadedModel,
    request: TextRequest,
    *,
    adapter: str | None,
    deadline_s: float | None = None,
    cache_salt: str = "",
    max_prompt_tokens: int | None = None,
) -> GenerationRequest:
    """Build the prompt's token ids and check them against the model's limits.

    Any thread may call it: it uses the tokenizer and the configuration, not the model's arrays.

    Args:
        max_prompt_tokens: the operator's limit, besides the model's context.

    Raises:
        InvalidRequestError: the prompt and the answer do not fit these limits, a token id
            is not one of the model's, its chat template refuses the messages, it cannot call
            functions as the request wants it, or no answer can be made to follow the schema.
    """
    form = None if request.tools is None else _find_form(loaded.tokenizer)
    prompt = _tokenize(loaded.tokenizer, request)
    source = request.source
    if not prompt:
        raise InvalidRequestError(f"{source} has no tokens; give some text", source)
    if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
        raise PromptTooLongError(
            f"{source} has {count(len(prompt), 'token')}; this service takes "
            f"{max_prompt_tokens} at most",
            source,
        )
    size = loaded.vocabulary_size
    _check_known(source, prompt, size)
    _check_known("stop_token_ids", request.stop_token_ids, size)
    _check_known("logit_bias", (token for token, _bias in request.sampling.logit_bias), size)
    max_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
    context = loaded.context_tokens
    if context is not None:
        room = context - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"{source} has {count(len(prompt), 'token')}; the model's context of {context} "
                "must hold it and the answer",
                source,
            )
        if request.max_tokens is None:
            max_tokens = min(max_tokens, room)
        elif max_tokens > room:
            raise PromptTooLongError(
                f"max_tokens must be an integer from 1 to {room} for this prompt of {len(prompt)} "
                f"tokens and the model's context of {context}, not {max_tokens}",
                "max_tokens",
            )
    return GenerationRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=request.sampling,
        stop=request.stop,
        adapter=adapter,
        deadline_s=deadline_s,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
        cache_salt=cache_salt,
        grammar=_compile_grammar(loaded, request, form),
    )


def _compile_grammar(
    loaded: LoadedModel, request: TextRequest, form: ToolForm | None
) -> str | None:
    field, grammar = RESPONSE_FORMAT, None
    if request.json_schema is not None:
        grammar = json_grammar(request.json_schema)
    if request.tools is not None and form is not None:
        lark = call_grammar(loaded.tokenizer, form, request.tools, request.json_schema)
        if lark is not None:
            field, grammar = "tools", lark_grammar(lark)
    if grammar is not None:
        loaded.guidance.compile(grammar, field)
    return grammar


def _find_form(tokenizer: Any) -> ToolForm:
    form = find_form(tokenizer)
    if form is None:
        raise InvalidRequestError(
            "tools cannot be used with this model: its chat template has no calls of functions, or "
            "has them in a form that is not known",
            "tools",
        )
    return form


def _check_known(name: str, tokens: Iterable[int], vocabulary_size: int | None) -> None:
    largest = max(tokens, default=0)
    if vocabulary_size is not None and largest >= vocabulary_size:
        raise InvalidRequestError(
            f"{name} has a token that the model does not know ({largest} of {vocabulary_size})",
            name,
        )


def _tokenize(tokenizer: Any, request: TextRequest) -> tuple[int, ...]:
    if request.token_ids is not None:
        return request.token_ids
    if request.messages and tokenizer.has_chat_template:
        return _render(tokenizer, request)
    if request.source == "messages":
        raise InvalidRequestError(
            "this model has no chat template for messages; send text or prompt instead", "messages"
        )
    # As mlx-lm does: the start token is added unless the text brings it.
    start = tokenizer.bos_token
    return tuple(
        tokenizer.encode(
            request.text, add_special_tokens=start is None or not request.text.startswith(start)
        )
    )


def _render(tokenizer: Any, request: TextRequest) -> tuple[int, ...]:
    """The conversation in the model's own form.

    The role `developer` is OpenAI's newer name of `system`: it is called so for a template that
    does not know it.
    """
    messages = [dict(message) for message in request.messages]
    template = tokenizer.chat_template  # None when it is a program of mlx-lm's
    if template is not None and "developer" not in str(template):
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    offered = {} if request.tools is None else {"tools": list(request.tools.functions)}
    try:
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **offered))
    except Exception as exc:  # a template is a program of the checkpoint's: anything may come
        raise InvalidRequestError(
            f"the model's chat template refuses {request.source}: {exc}", request.source
        ) from exc
