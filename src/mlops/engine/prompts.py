"""From a client's request to token ids: the chat template, the tokenizer and the model's limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlops.engine.loading import LoadedModel
from mlops.engine.request import DEFAULT_MAX_TOKENS, GenerationRequest, TextRequest
from mlops.errors import InvalidRequestError


def to_generation_request(
    loaded: LoadedModel,
    request: TextRequest,
    *,
    adapter: str | None,
    is_cancelled: Callable[[], bool] | None = None,
    deadline_s: float | None = None,
) -> GenerationRequest:
    """Build the prompt's token ids and check them against the model's limits.

    Raises:
        InvalidRequestError: the prompt and the answer do not fit the model's context, or the
            model's chat template refuses the messages.
    """
    prompt = _tokenize(loaded.tokenizer, request)
    source = request.source
    if not prompt:
        raise InvalidRequestError(f"{source} has no tokens; give some text", source)
    size = loaded.vocabulary_size
    if size is not None and max(prompt) >= size:
        raise InvalidRequestError(
            f"{source} has a token that the model does not know ({max(prompt)} of {size})", source
        )
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
        is_cancelled=is_cancelled,
        deadline_s=deadline_s,
    )


def _tokenize(tokenizer: Any, request: TextRequest) -> tuple[int, ...]:
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
