"""What a configuration field may hold: one `Rule` per field, kept on construction and assignment.

`config` states its fields and their rules; this module checks values and words the errors.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from os import PathLike, fspath
from typing import Any, ClassVar, Self

from mlops.errors import ConfigError

_MAX_SHOWN = 120
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _MAX_SHOWN


@dataclass(frozen=True)
class Rule:
    """What one field may hold.

    Attributes:
        allowed: ends the sentence "... is not allowed; use".
        accept: returns the value to store; raises TypeError or ValueError for a bad one.
        parse: makes the value from an environment variable's text; raises ValueError.
    """

    allowed: str
    accept: Callable[[Any], Any]
    parse: Callable[[str], Any] = str


class CheckedFields:
    """Base of a dataclass whose every field is checked when it is made and when it is assigned."""

    _rules: ClassVar[Mapping[str, Rule]]

    def __new__(cls, *_args: Any, **fields: Any) -> Self:
        for name, value in fields.items():
            cls.rule(name, value)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, self.checked(name, value))

    @classmethod
    def has_field(cls, name: str) -> bool:
        return name in cls._rules

    @classmethod
    def rule(cls, name: str, value: Any, shown_as: str | None = None) -> Rule:
        """The rule of a field; a ConfigError, with the nearest names, when there is no such field.

        Args:
            shown_as: the name to blame, when the value came under another one.
        """
        if name in cls._rules:
            return cls._rules[name]
        raise unknown_name(shown_as or name, value, cls.__name__, cls._rules)

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """The value as the field stores it; a ConfigError when the field may not hold it."""
        rule = cls.rule(name, value)
        try:
            return rule.accept(value)
        except (TypeError, ValueError) as exc:
            if isinstance(exc, ConfigError):  # of a nested configuration, which names its field
                raise
            raise not_allowed(f"{cls.__name__}.{name}", value, rule.allowed) from None

    def validate(self) -> None:
        """Check every field again: a list or table may have been changed in place.

        Raises:
            ConfigError: a field holds what it may not.
        """
        for name in self._rules:
            setattr(self, name, getattr(self, name))


def not_allowed(name: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{name} = {shown(value)} is not allowed; use {allowed}")


def unknown_name(name: str, value: Any, owner: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(
        f"{owner} has no field {shown(name)} (given as {shown(value)}); "
        f"{hint}Its fields are {', '.join(known)}"
    )


def shown(value: Any) -> str:
    """A bounded `repr`: the value may be a client's or a file's."""
    try:
        written = _SHORT.repr(value)
    except ValueError:  # Python refuses to print an int of thousands of digits
        return "<a very large number>"
    return written if len(written) <= _MAX_SHOWN else f"{written[: _MAX_SHOWN - 3]}..."


def flag() -> Rule:
    return Rule("true or false", _boolean, _boolean_text)


def whole_number(low: int, high: int) -> Rule:
    def accept(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return int(value)

    return Rule(f"a whole number from {low} to {high}", accept, int)


def positive_number(high: float) -> Rule:
    def accept(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if not math.isfinite(value) or not 0 < value <= high:
            raise ValueError
        return value

    return Rule(f"a number above 0 and up to {high:g}", accept, float)


def number_from_0(high: float) -> Rule:
    above_0 = positive_number(high)

    def accept(value: Any) -> float:
        is_0 = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
        return 0.0 if is_0 else above_0.accept(value)

    return Rule(f"a number from 0 to {high:g}", accept, float)


def choice(options: type[Enum]) -> Rule:
    return Rule("one of " + ", ".join(repr(option.value) for option in options), options)


def text(
    allowed: str = "one line of text",
    *,
    pattern: str = r".+",
    max_length: int = 255,
    other_than: frozenset[str] = frozenset(),
) -> Rule:
    """One line that the whole pattern matches, without control characters."""
    matches = re.compile(pattern).fullmatch

    def accept(value: Any) -> str:
        if not isinstance(value, str) or len(value) > max_length or not value.isprintable():
            raise ValueError
        if not matches(value) or value in other_than:
            raise ValueError
        return str(value)

    return Rule(f"{allowed}, at most {max_length} characters", accept)


def path() -> Rule:
    line = text(max_length=4096)

    def accept(value: Any) -> str:
        checked: str = line.accept(fspath(value) if isinstance(value, PathLike) else value)
        return checked

    return Rule(f"a path, a model tag or a hub id: {line.allowed}", accept)


def host() -> Rule:
    line = text()

    def accept(value: Any) -> str:
        name: str = line.accept(value)
        if name != "localhost":
            ipaddress.ip_address(name)
        return name

    return Rule("an IP address such as '127.0.0.1' or '0.0.0.0', or 'localhost'", accept)


def ray_address() -> Rule:
    line = text()
    cluster = re.compile(r"(?:ray://)?(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")

    def accept(value: Any) -> str:
        address: str = line.accept(value)
        found = cluster.fullmatch(address)
        if address not in {"auto", "local"} and not (found and 0 < int(found[1]) < 65536):
            raise ValueError
        return address

    return Rule("'auto', 'local', 'HOST:PORT' or 'ray://HOST:PORT'", accept)


def labels() -> Rule:
    """A table of text to text; `name=value,name=value` in the environment."""
    line, rest = text(), text(pattern=r".*")

    def accept(value: Any) -> dict[str, str]:
        if not isinstance(value, Mapping) or len(value) > 100:
            raise ValueError
        return {line.accept(name): rest.accept(item) for name, item in value.items()}

    def parse(written: str) -> dict[str, str]:
        pairs = [part.partition("=") for part in written.split(",")]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError
        return {name.strip(): item.strip() for name, _, item in pairs}

    return Rule("a table of at most 100 texts to texts, such as team=ml,env=test", accept, parse)


_RAYS_OWN = frozenset({"CPU", "GPU", "memory", "object_store_memory"})


def amounts() -> Rule:
    """A table of text to numbers; `name=value,name=value` in the environment."""
    line, amount = text(other_than=_RAYS_OWN), positive_number(1e9)

    def accept(value: Any) -> dict[str, float]:
        if not isinstance(value, Mapping) or len(value) > 100:
            raise ValueError
        return {line.accept(name): amount.accept(item) for name, item in value.items()}

    def parse(written: str) -> dict[str, float]:
        pairs = [part.partition("=") for part in written.split(",")]
        return {name.strip(): float(item) for name, _, item in pairs}

    return Rule("a table of at most 100 texts to numbers above 0, such as a=1,b=0.5", accept, parse)


def origins() -> Rule:
    """Origins of web pages; between commas in the environment."""
    origin = text(pattern=r"\*|https?://[A-Za-z0-9.\[\]:_-]+")
    return _several(origin, "origins such as https://example.com, or *")


def host_names() -> Rule:
    """What clients may call a server, without a port; between commas in the environment."""
    ipv6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*"
    name = text(pattern=rf"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|{ipv6}")
    return _several(name, "host names such as models.example.com or *.example.com, or *")


def _several(line: Rule, allowed: str) -> Rule:
    def accept(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or len(value) > 100:
            raise ValueError
        return tuple(line.accept(item) for item in value)

    def parse(written: str) -> list[str]:
        return [part.strip() for part in written.split(",")]

    return Rule(f"a list of at most 100 {allowed}", accept, parse)


def optional(rule: Rule) -> Rule:
    return Rule(
        f"{rule.allowed}; or None",
        lambda value: None if value is None else rule.accept(value),
        rule.parse,
    )


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _boolean_text(written: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if written.lower() not in words:
        raise ValueError
    return words[written.lower()]
