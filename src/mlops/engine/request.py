"""What a client may ask for: the fields of a request, checked, and what generation makes of them.

    body of a request -> `parse_request` -> TextRequest -> prompts.tokenize -> GenerationRequest

Nothing here imports MLX, so a bad request is refused in microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlops.errors import InvalidRequestError

DEFAULT_MAX_TOKENS = 256
MAX_TEMPERATURE = 10.0
MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 1024
PROMPT_FIELDS = ("text", "input", "prompt", "messages")
ROLES = ("system", "user", "assistant", "tool", "developer")
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

    Raises:
        InvalidRequestError: a field is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise _invalid("top_p", self.top_p, "a number above 0, at most 1")
        _check_number("min_p", self.min_p, 0, 1)
        _check_integer("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True)
class TextRequest:
    """A client's request, checked, before the tokenizer has seen it.

    Attributes:
        source: the field that brought the prompt: `text`, `input`, `prompt` or `messages`.
        text: the prompt's text; "" when `source` is `messages`.
        messages: the conversation, each with `role` and `content`; one user message for `text`
            and `input`, none for a raw `prompt`.
        max_tokens: None lets the default and the model's context decide.
        names_adapter: whether the request has the field `adapter` at all.
        adapter: the adapter's name; None is the base model.
    """

    source: str
    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
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
        is_cancelled: asked at every step; once it says True, generation ends.
        deadline_s: `time.monotonic()` at which the request's time is over.

    Raises:
        InvalidRequestError: a field is out of its range.
    """

    prompt: tuple[int, ...]
    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    is_cancelled: Callable[[], bool] | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequestError("the prompt has no tokens; give some text", "prompt")
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_stop(self.stop)


def parse_request(data: str | Mapping[str, Any]) -> TextRequest:
    """Check a request's fields.

    Args:
        data: the text itself, or a mapping with exactly one of `text`, `input`, `prompt` and
            `messages`, and any of `max_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `seed`,
            `stop` and `adapter`.

    Raises:
        InvalidRequestError: names the field, its value and what is allowed.
    """
    if isinstance(data, str):
        data = {"text": data}
    if not isinstance(data, Mapping):
        raise InvalidRequestError(
            f"a request is a text or an object with fields, not {_show(data)}", ""
        )
    sampling_fields = ("temperature", "top_p", "top_k", "min_p", "seed")
    allowed = (*PROMPT_FIELDS, "max_tokens", *sampling_fields, "stop", "adapter")
    for name in data:
        if name not in allowed:
            raise InvalidRequestError(
                f"unknown field {_show(name)}; allowed are {', '.join(allowed)}", str(name)[:64]
            )
    sources = [name for name in PROMPT_FIELDS if name in data]
    if len(sources) != 1:
        found = f"this one has {' and '.join(sources)}" if sources else "this one has none"
        raise InvalidRequestError(
            f"a request has exactly one of {', '.join(PROMPT_FIELDS)}; {found}",
            sources[1] if sources else "text",
        )
    source = sources[0]
    is_conversation = source == "messages"
    text = "" if is_conversation else _parse_text(source, data[source])
    messages: tuple[Mapping[str, str], ...] = ()
    if is_conversation:
        messages = _parse_messages(data[source])
    elif source != "prompt":
        messages = ({"role": "user", "content": text},)

    max_tokens = data.get("max_tokens")
    if max_tokens is not None:
        _check_integer("max_tokens", max_tokens, 1)
    # A field that is null is a field left out, as JSON clients mean it.
    given = {name: data[name] for name in sampling_fields if data.get(name) is not None}
    return TextRequest(
        source=source,
        text=text,
        messages=messages,
        max_tokens=max_tokens,
        sampling=Sampling(**given),
        stop=_parse_stop(data.get("stop")),
        names_adapter="adapter" in data,
        adapter=_parse_adapter(data.get("adapter")),
    )


def _parse_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _invalid(name, value, "a text that is not empty")
    if not _is_encodable(value):
        raise InvalidRequestError(f"{name} has half a surrogate pair, which is no character", name)
    return value


def _parse_messages(value: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_MESSAGES:
        raise _invalid("messages", value, f"a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    for number, message in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise _invalid(name, message, "an object with role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise _invalid(f"{name}.role", role, f"one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not _is_encodable(content):
            raise _invalid(f"{name}.content", content, "a text")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _parse_stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    stop = (value,) if isinstance(value, str) else value
    if not isinstance(stop, list | tuple):
        raise _invalid("stop", value, "a text or a list of texts")
    return _check_stop(tuple(stop))


def _check_stop(stop: tuple[Any, ...]) -> tuple[str, ...]:
    if len(stop) > MAX_STOPS:
        raise _invalid("stop", f"{len(stop)} texts", f"at most {MAX_STOPS} texts")
    for text in stop:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise _invalid("stop", text, f"texts of 1 to {MAX_STOP_CHARACTERS} characters")
    return stop


def _parse_adapter(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _invalid("adapter", value, "an adapter's name, or null for the base model")
    return None if value == BASE_NAME else value


def _check_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # NaN is in no range
        raise _invalid(name, value, f"a number from {low:g} to {high:g}")


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        limit = f"from {low}" if high is None else f"from {low} to {high}"
        raise _invalid(name, value, f"an integer {limit}")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _invalid(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {allowed}, not {_show(value)}", name)


def _show(value: object) -> str:
    """A value for a message: short, whatever a client sent."""
    if isinstance(value, str):
        return repr(value[:80]) + ("…" if len(value) > 80 else "")
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {len(value)} fields"
    if isinstance(value, int) and abs(value) > 10**20:
        return "an integer of more than 20 digits"
    return repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"
