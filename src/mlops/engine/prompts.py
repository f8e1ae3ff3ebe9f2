"""From a client's request to token ids: the chat template, the tokenizer and the model's limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlops.engine.request import DEFAULT_MAX_TOKENS, GenerationRequest, TextRequest
from mlops.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlops.engine.loading import LoadedModel


def to_generation_request(
    loaded: LoadedModel,
    request: TextRequest,
    *,
    adapter: str | None,
    deadline_s: float | None = None,
    cache_salt: str = "",
) -> GenerationRequest:
    """Build the prompt's token ids and check them against the model's limits.

    Any thread may call it: it uses the tokenizer and the configuration, not the model's arrays.

    Raises:
        InvalidRequestError: the prompt and the answer do not fit the model's context, a token id
            is not one of the model's, or its chat template refuses the messages.
    """
    prompt = _tokenize(loaded.tokenizer, request)
    source = request.source
    if not prompt:
        raise InvalidRequestError(f"{source} has no tokens; give some text", source)
    size = loaded.vocabulary_size
    _check_known(source, prompt, size)
    _check_known("stop_token_ids", request.stop_token_ids, size)
    _check_known("logit_bias", (token for token, _bias in request.sampling.logit_bias), size)
    max_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
    context = loaded.context_tokens
    if context is not None:
        room = context - len(prompt)
        if room < 1:
            raise InvalidRequestError(
                f"{source} has {len(prompt)} tokens; the model's context of {context} tokens must "
                "hold it and the answer",
                source,
            )
        if request.max_tokens is None:
            max_tokens = min(max_tokens, room)
        elif max_tokens > room:
            raise InvalidRequestError(
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
        try:
            return tuple(
                tokenizer.apply_chat_template(
                    [dict(message) for message in request.messages], add_generation_prompt=True
                )
            )
        except Exception as exc:  # a template is a program of the checkpoint's: anything may come
            raise InvalidRequestError(
                f"the model's chat template refuses {request.source}: {exc}", request.source
            ) from exc
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
