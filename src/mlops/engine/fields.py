"""What one field of a request may hold, and the sentence for a value that it may not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlops.counts import count
from mlops.errors import InvalidRequestError

MAX_TOKEN_ID = 2**31 - 1
MAX_PROMPT_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 256
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise `InvalidRequestError` unless `value` is a number from `low` to `high`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # NaN is in no range
        raise invalid(name, value, f"a number from {low:g} to {high:g}")


def check_positive_number(name: str, value: object, high: float) -> None:
    """Raise `InvalidRequestError` unless `value` is a number above 0, at most `high`."""
    check_number(name, value, 0, high)
    if value == 0:
        raise invalid(name, value, f"a number above 0, at most {high:g}")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise `InvalidRequestError` unless `value` is an integer from `low` to `high`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        limit = f"from {low}" if high is None else f"from {low} to {high}"
        raise invalid(name, value, f"an integer {limit}")


def check_flag(name: str, value: object) -> None:
    """Raise `InvalidRequestError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise invalid(name, value, "true or false")


def check_token_ids(name: str, values: Any, low: int, high: int) -> None:
    """Raise `InvalidRequestError` unless `values` are `low` to `high` token ids."""
    if not low <= len(values) <= high:
        raise invalid(name, values, f"a list of {low} to {high} token ids")
    for value in values:
        if type(value) is not int or not 0 <= value <= MAX_TOKEN_ID:
            raise InvalidRequestError(
                f"{name} must hold token ids, integers from 0, not {show(value)}", name
            )


def check_stop(stop: tuple[Any, ...]) -> None:
    """Raise `InvalidRequestError` unless these are stop texts."""
    if len(stop) > MAX_STOPS:
        raise invalid("stop", f"{len(stop)} texts", f"at most {MAX_STOPS} texts")
    for text in stop:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise invalid("stop", text, f"texts of 1 to {MAX_STOP_CHARACTERS} characters")


def check_logit_bias(bias: tuple[tuple[Any, Any], ...]) -> None:
    """Raise `InvalidRequestError` unless these are pairs of a token id, each once, and its bias."""
    tokens = [token for token, _value in bias]
    check_token_ids("logit_bias", tokens, 0, MAX_BIASED_TOKENS)
    if len(set(tokens)) < len(tokens):
        raise InvalidRequestError("logit_bias must name every token at most once", "logit_bias")
    for _token, value in bias:
        check_number("logit_bias", value, -MAX_BIAS, MAX_BIAS)


def read_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs from an object whose keys are token ids: integers, or their digits as in JSON."""
    if not isinstance(value, Mapping):
        raise invalid("logit_bias", value, "an object from token ids to numbers")
    if len(value) > MAX_BIASED_TOKENS:
        raise invalid("logit_bias", value, f"an object with at most {MAX_BIASED_TOKENS} token ids")
    return tuple((_read_token_id(token), bias) for token, bias in value.items())


def check_names(
    name: str, given: Iterable[object], allowed: Sequence[str], where: str = ""
) -> None:
    """Raise `InvalidRequestError` unless these fields of the object `name` are known ones."""
    for field in given:
        if field not in allowed:
            shown = str(field)[:64].encode("ascii", "backslashreplace").decode()
            raise InvalidRequestError(
                f"unknown field {name}.{shown}; allowed are {', '.join(allowed)}{where}",
                f"{name}.{shown}",
            )


def is_longer(value: object, num_characters: int) -> bool:
    """Whether a value of JSON types has more characters as JSON; of long ones it reads a part.

    Numbers and punctuation count as one each, and a list that begins with a number by its length.
    """
    left, found = [value], 0
    while left and found <= num_characters:
        one = left.pop()
        if isinstance(one, str):
            found += len(one)
        elif isinstance(one, Mapping):
            found += len(one)
            if found <= num_characters:
                left += one
                left += one.values()
        elif isinstance(one, list | tuple):
            found += len(one)
            if found <= num_characters and not (one and isinstance(one[0], int | float)):
                left += one
    return found > num_characters


def is_encodable(text: str) -> bool:
    """False for a text with half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def invalid(name: str, value: object, allowed: str) -> InvalidRequestError:
    """The error that names the field, what is allowed and what came."""
    return InvalidRequestError(f"{name} must be {allowed}, not {show(value)}", name)


def show(value: object) -> str:
    """A value for a message: short, whatever a client sent."""
    if isinstance(value, str):
        return repr(value[:80]) + ("…" if len(value) > 80 else "")
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {count(len(value), 'field')}"
    if isinstance(value, int) and abs(value) > 10**20:
        return "an integer of more than 20 digits"
    return repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"


def _read_token_id(key: object) -> Any:
    # One spelling only: "01" beside "1" would be the same token twice.
    if isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,9}", key):
        return int(key)
    return key
