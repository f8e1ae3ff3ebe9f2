"""What a client may ask for: the fields of a request, checked, and what generation makes of them.

    body of a request -> `parse_request` -> TextRequest -> prompts.tokenize -> GenerationRequest

Nothing here imports MLX, so a bad request is refused in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlops.engine.fields import (
    MAX_PROMPT_TOKENS,
    MAX_STOP_TOKENS,
    check_flag,
    check_integer,
    check_logit_bias,
    check_number,
    check_positive_number,
    check_stop,
    check_token_ids,
    invalid,
    is_encodable,
    read_logit_bias,
    show,
)
from mlops.engine.messages import TOOL_FIELDS, Tools, parse_messages, parse_tools
from mlops.engine.response_format import FIELD as RESPONSE_FORMAT
from mlops.engine.response_format import read_response_format
from mlops.errors import InvalidRequestError

DEFAULT_MAX_TOKENS = 256
MAX_TEMPERATURE = 10.0
MAX_REPETITION_PENALTY = 10.0
MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
MAX_TOLD_LOGPROBS = 2**20
"""Log-probabilities of one whole answer: some 150 MB while it is put together."""
MAX_CHOICES = 16
PROMPT_FIELDS = ("text", "input", "prompt", "messages")
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
FIELDS = (
    *PROMPT_FIELDS,
    *TOOL_FIELDS,
    "max_tokens",
    *SAMPLING_FIELDS,
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "n",
    "response_format",
    "adapter",
)
BASE_NAME = "base"
"""As the value of `adapter`: the base model, without an adapter."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: keep the most likely tokens whose probabilities reach this sum.
        top_k: keep so many of the most likely tokens; 0 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one.
        seed: the same seed draws the same tokens; None draws new ones each time.
        repetition_penalty: above 1, tokens of the prompt and the answer become less likely.
        presence_penalty: subtracted from the logit of every token that the answer has.
        frequency_penalty: subtracted as often as the answer has the token.
        logit_bias: pairs of a token id and what is added to its logit.

    Raises:
        InvalidRequestError: a field is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_positive_number("top_p", self.top_p, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_integer("top_k", self.top_k, 0)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, MAX_SEED)
        check_positive_number("repetition_penalty", self.repetition_penalty, MAX_REPETITION_PENALTY)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_logit_bias(self.logit_bias)


@dataclass(frozen=True)
class TextRequest:
    """A client's request, checked, before the tokenizer has seen it.

    Attributes:
        source: the field that brought the prompt: `text`, `input`, `prompt` or `messages`.
        text: the prompt's text; "" when `source` is `messages`, or a `prompt` of token ids.
        messages: the conversation, as `parse_messages` gives it; one user message for `text` and
            `input`, none for a raw `prompt`.
        tools: the functions that the model may call; None when there are none.
        token_ids: a `prompt` that came as token ids; else None.
        max_tokens: None lets the default and the model's context decide.
        stop, stop_token_ids, ignore_eos, logprobs: as in `GenerationRequest`.
        n: so many answers to the same prompt (`split_choices`).
        json_schema: what the answer must follow, as JSON; None is free text.
        names_adapter: whether the request has the field `adapter` at all.
        adapter: the adapter's name; None is the base model.
    """

    source: str
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: Tools | None = None
    token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    json_schema: str | None = None
    names_adapter: bool = False
    adapter: str | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One generation.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: the most tokens to generate.
        stop: generation ends before the first of these texts.
        adapter: name of a resident adapter; None is the base model.
        deadline_s: `time.monotonic()` at which the request's time is over.
        stop_token_ids: generation ends at the first of these tokens.
        ignore_eos: the model's own end tokens do not end generation.
        logprobs: None asks for no log-probabilities; otherwise every token comes with its own and
            those of so many of the likeliest tokens.
        cache_salt: requests with different salts never share cached prefixes.
        grammar: what the answer must follow, as `engine.guidance` writes it; None is free text.

    Raises:
        InvalidRequestError: a field is out of its range.
    """

    prompt: tuple[int, ...]
    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    deadline_s: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    cache_salt: str = ""
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequestError("the prompt has no tokens; give some text", "prompt")
        check_integer("max_tokens", self.max_tokens, 1)
        check_stop(self.stop)
        check_token_ids("stop_token_ids", self.stop_token_ids, 0, MAX_STOP_TOKENS)
        check_flag("ignore_eos", self.ignore_eos)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.grammar is not None and self.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos cannot be used with response_format or required calls: the end of the "
                "form ends the answer",
                "ignore_eos",
            )


def split_choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """The `n` generations of a request for `n` answers.

    Each has a seed of its own, the first the request's; without a seed all draw at random.
    """
    seed = request.sampling.seed
    if seed is None:
        return [request] * n
    return [
        replace(request, sampling=replace(request.sampling, seed=(seed + i) % (MAX_SEED + 1)))
        for i in range(n)
    ]


def parse_request(data: str | Mapping[str, Any]) -> TextRequest:
    """Check a request's fields.

    Args:
        data: the text itself, or a mapping with exactly one of `text`, `input`, `prompt` and
            `messages`, and any other of `FIELDS`. `prompt` may be a list of token ids.

    Raises:
        InvalidRequestError: names the field, its value and what is allowed.
    """
    if isinstance(data, str):
        data = {"text": data}
    if not isinstance(data, Mapping):
        raise InvalidRequestError(
            f"a request is a text or an object with fields, not {show(data)}", ""
        )
    for name in data:
        if name not in FIELDS:
            raise InvalidRequestError(
                f"unknown field {show(name)}; allowed are {', '.join(FIELDS)}", str(name)[:64]
            )
    names_adapter = "adapter" in data
    check_told_logprobs(data)
    # A field that is null is a field left out, as JSON clients mean it; but not the prompt.
    given = {k: value for k, value in data.items() if value is not None or k in PROMPT_FIELDS}
    return TextRequest(
        **_parse_prompt(given),
        tools=parse_tools(given),
        max_tokens=_parse_integer(given, "max_tokens", None, 1),
        sampling=_parse_sampling(given),
        stop=_parse_stop(given.get("stop", ())),
        stop_token_ids=_parse_token_ids(
            "stop_token_ids", given.get("stop_token_ids", ()), 0, MAX_STOP_TOKENS
        ),
        ignore_eos=_parse_flag(given, "ignore_eos"),
        logprobs=_parse_integer(given, "logprobs", None, 0, MAX_LOGPROBS),
        n=_parse_integer(given, "n", 1, 1, MAX_CHOICES),
        json_schema=_parse_response_format(given),
        names_adapter=names_adapter,
        adapter=_parse_adapter(given.get("adapter")),
    )


def check_told_logprobs(data: Mapping[str, Any], num_prompts: int = 1) -> None:
    """Refuse an answer that would be too large; what is no integer, others refuse.

    Raises:
        InvalidRequestError: says how many log-probabilities there may be.
    """
    fields = [data.get("logprobs"), data.get("max_tokens") or DEFAULT_MAX_TOKENS, data.get("n", 1)]
    if any(type(one) is not int for one in fields):
        return
    told, max_tokens, n = fields
    if num_prompts * n * max_tokens * (told + 1) > MAX_TOLD_LOGPROBS:
        raise InvalidRequestError(
            f"logprobs asks for too many numbers: answers x max_tokens x (logprobs + 1) may be at "
            f"most {MAX_TOLD_LOGPROBS}",
            "logprobs",
        )


def _parse_prompt(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `source`, `text`, `messages` and `token_ids` of a `TextRequest`."""
    sources = [name for name in PROMPT_FIELDS if name in given]
    if len(sources) != 1:
        found = f"this one has {' and '.join(sources)}" if sources else "this one has none"
        raise InvalidRequestError(
            f"a request has exactly one of {', '.join(PROMPT_FIELDS)}; {found}",
            sources[1] if sources else "text",
        )
    source = sources[0]
    value = given[source]
    if source == "messages":
        return {"source": source, "messages": parse_messages(value)}
    if source == "prompt" and isinstance(value, list | tuple):
        token_ids = _parse_token_ids(source, value, 1, MAX_PROMPT_TOKENS)
        return {"source": source, "token_ids": token_ids}
    if source == "prompt" and not isinstance(value, str):
        raise invalid(source, value, "a text that is not empty, or a list of token ids")
    text = _parse_text(source, value)
    messages = () if source == "prompt" else ({"role": "user", "content": text},)
    return {"source": source, "text": text, "messages": messages}


def _parse_sampling(given: Mapping[str, Any]) -> Sampling:
    fields = {name: given[name] for name in SAMPLING_FIELDS if name in given}
    if "logit_bias" in fields:
        fields["logit_bias"] = read_logit_bias(fields["logit_bias"])
    return Sampling(**fields)


def _parse_integer(
    given: Mapping[str, Any], name: str, default: int | None, low: int, high: int | None = None
) -> Any:
    value = given.get(name, default)
    if value is not None:
        check_integer(name, value, low, high)
    return value


def _parse_flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    check_flag(name, value)
    return bool(value)


def _parse_response_format(given: Mapping[str, Any]) -> str | None:
    return read_response_format(given[RESPONSE_FORMAT]) if RESPONSE_FORMAT in given else None


def _parse_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(name, value, "a text that is not empty")
    if not is_encodable(value):
        raise InvalidRequestError(f"{name} has half a surrogate pair, which is no character", name)
    return value


def _parse_token_ids(name: str, value: object, low: int, high: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise invalid(name, value, f"a list of {low} to {high} token ids")
    check_token_ids(name, value, low, high)
    return tuple(value)


def _parse_stop(value: object) -> tuple[str, ...]:
    stop = (value,) if isinstance(value, str) else value
    if not isinstance(stop, list | tuple):
        raise invalid("stop", value, "a text or a list of texts")
    check_stop(tuple(stop))
    return tuple(stop)


def _parse_adapter(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise invalid("adapter", value, "an adapter's name, or null for the base model")
    return None if value == BASE_NAME else value
