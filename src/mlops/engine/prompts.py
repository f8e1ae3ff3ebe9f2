"""From a client's request to token ids: the chat template, the tokenizer and the model's limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlops.counts import count
from mlops.engine.chat_template import find_template, is_program, refuse, render
from mlops.engine.guidance import json_grammar, lark_grammar, shorten
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
    What a request says of the answer's form is `add_grammar`'s.

    Args:
        max_prompt_tokens: the operator's limit, besides the model's context.

    Raises:
        InvalidRequestError: the prompt and the answer do not fit these limits, a token id
            is not one of the model's, its chat template refuses the messages, or it cannot call
            functions.
    """
    if request.tools is not None:
        _find_form(loaded.tokenizer)
    source = request.source
    prompt = _tokenize(loaded, request, max_prompt_tokens)
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
    )


def may_need_grammar(request: TextRequest) -> bool:
    """Whether `add_grammar` has something to do, which may take a second."""
    return request.json_schema is not None or request.tools is not None


def add_grammar(
    loaded: LoadedModel, request: TextRequest, generation: GenerationRequest
) -> GenerationRequest:
    """The generation with the grammar that its answer must follow, compiled.

    Args:
        generation: what `to_generation_request` made of the request.

    Raises:
        InvalidRequestError: no answer can be made to follow the schema, or calls of functions
            cannot be made certain.
    """
    field, grammar = RESPONSE_FORMAT, None
    if request.json_schema is not None:
        grammar = json_grammar(request.json_schema)
    if request.tools is not None:
        form = _find_form(loaded.tokenizer)
        lark = call_grammar(loaded.tokenizer, form, request.tools, request.json_schema)
        if lark is not None:
            field, grammar = "tools", lark_grammar(lark)
    if grammar is None:
        return generation
    loaded.guidance.compile(grammar, field)
    return replace(generation, grammar=grammar)


def check_may_fit(
    loaded: LoadedModel, source: str, text: str, max_prompt_tokens: int | None, room: int = 0
) -> None:
    """Refuse, before it is tokenized, a text that cannot fit.

    Args:
        source: the field that brought it, for the message.
        max_prompt_tokens: the operator's limit, besides the model's context.
        room: tokens of the context that must be left.

    Raises:
        PromptTooLongError: it has more tokens, however it is tokenized.
    """
    context = loaded.context_tokens
    limits = [context - room] if context is not None else []
    limits += [max_prompt_tokens] if max_prompt_tokens is not None else []
    # A character has at most four bytes, and a byte is a token at most.
    if not limits or 4 * len(text) <= min(limits):
        return
    fewest = loaded.token_bound.fewest_tokens(text)
    if max_prompt_tokens is not None and fewest > max_prompt_tokens:
        raise PromptTooLongError(
            f"{source} has at least {fewest} tokens; this service takes {max_prompt_tokens} at "
            "most",
            source,
        )
    if context is not None and fewest > context - room:
        raise PromptTooLongError(
            f"{source} has at least {fewest} tokens; the model's context is {context}", source
        )


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


def _tokenize(
    loaded: LoadedModel, request: TextRequest, max_prompt_tokens: int | None
) -> tuple[int, ...]:
    if request.token_ids is not None:
        return request.token_ids
    tokenizer, text = loaded.tokenizer, request.text
    if request.messages and tokenizer.has_chat_template:
        text, adds_start = _render(tokenizer, request), False
    elif request.source == "messages":
        raise InvalidRequestError(
            "this model has no chat template for messages; send text or prompt instead", "messages"
        )
    else:
        # As mlx-lm does: the start token is added unless the text brings it.
        start = tokenizer.bos_token
        adds_start = start is None or not text.startswith(start)
    check_may_fit(loaded, request.source, text, max_prompt_tokens, room=1)
    return tuple(tokenizer.encode(text, add_special_tokens=adds_start))


def _render(tokenizer: Any, request: TextRequest) -> str:
    """The conversation in the model's own form.

    The role `developer` is OpenAI's newer name of `system`: it is called so for a template that
    does not know it.
    """
    if is_program(tokenizer):
        return _render_by_program(tokenizer, request)
    offered = None if request.tools is None else request.tools.functions
    messages = [dict(message) for message in request.messages]
    if "developer" not in find_template(tokenizer, offered, request.source):
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    return render(tokenizer, messages, request.tools, request.source)


def _render_by_program(tokenizer: Any, request: TextRequest) -> str:
    """The same with a program of mlx-lm's own, which some models have in place of a template."""
    offered = {} if request.tools is None else {"tools": list(request.tools.functions)}
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in request.messages],
            tokenize=False,
            add_generation_prompt=True,
            **offered,
        )
    except Exception as exc:  # whatever it does not like
        raise refuse(request.source, shorten(str(exc))) from exc
    return text
