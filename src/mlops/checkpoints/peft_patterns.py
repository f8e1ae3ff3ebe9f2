"""PEFT's `rank_pattern` and `alpha_pattern`: regular expressions that choose modules by name.

The first key that matches decides, as in `get_pattern_key` of `peft.utils.other` (PEFT 0.21):
`re.match(rf"(.*\\.)?({key})$", name)`. The expressions come from strangers, and Python's own
matcher can take forever on some, so it gets only keys without operators. For all others the set of
positions reached so far, a bit each, goes through the parsed expression once: nothing is ever tried
again. Steps are counted and limited.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from re import _constants as regex  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from mlops.checkpoints.refusal import refusal

MAX_KEY_LENGTH = 512
MAX_KEYS = 10_000
MAX_STEPS = 3_000_000
"""For all keys and all modules of an adapter: some seconds. EVA writes a key for each module, which
takes 1.6 million steps in a model of 126 layers."""

_WITHOUT_OPERATORS = re.compile(r"\^?[A-Za-z0-9_.]+\$?")

_CATEGORIES: Mapping[Any, Callable[[str], bool]] = {
    regex.CATEGORY_DIGIT: str.isdecimal,
    regex.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    regex.CATEGORY_SPACE: str.isspace,
    regex.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    regex.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    regex.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}
_UNDERSTOOD = frozenset({
    regex.ANY, regex.AT, regex.BRANCH, regex.IN, regex.LITERAL, regex.MAX_REPEAT, regex.MIN_REPEAT,
    regex.NOT_LITERAL, regex.SUBPATTERN,
})  # fmt: skip
_ANCHORS = frozenset(
    {regex.AT_BEGINNING, regex.AT_BEGINNING_STRING, regex.AT_END, regex.AT_END_STRING}
)


class ModulePatterns:
    """One of the two settings: numbers by regular expressions.

    Args:
        setting: `rank_pattern` or `alpha_pattern`, for messages.
        patterns: its value in `adapter_config.json`.
        read_number: the number of a value, or None when it is none.

    Raises:
        PackagingError: a key is no regular expression, or of a kind that is not understood, or a
            value is no number.
    """

    def __init__(
        self,
        path: Path,
        setting: str,
        patterns: Any,
        read_number: Callable[[Any], float | None],
    ) -> None:
        self._path = path
        self._setting = setting
        self._steps = _Steps(MAX_STEPS)
        if patterns is None:
            patterns = {}
        if not isinstance(patterns, dict) or len(patterns) > MAX_KEYS:
            raise self._refusal(f"is not an object of at most {MAX_KEYS} names")
        self._numbers: dict[str, float] = {}
        for key, value in patterns.items():
            number = read_number(value)
            if number is None:
                raise self._refusal(f"has {key[:80]!r}: {str(value)[:40]!r}, which is no number")
            self._numbers[key] = number
        self._expressions = {key: self._read(key) for key in self._numbers}

    def find(self, module: str) -> float | None:
        """The number for a module, by its name in the model that PEFT trained; None: there is none.

        Raises:
            PackagingError: that takes too many steps.
        """
        name = _Name(module, self._steps)
        try:
            for key, expression in self._expressions.items():
                if name.matches(expression):
                    return self._numbers[key]
        except _TooManyStepsError:
            raise self._refusal(
                "takes too long to match: write the names of the modules out"
            ) from None
        return self._numbers.get(module)

    def _read(self, key: str) -> Any:
        """The key as PEFT wraps it: compiled where it has no operators, else parsed."""
        if len(key) > MAX_KEY_LENGTH:
            raise self._refusal(f"has a key of {len(key)} characters; {MAX_KEY_LENGTH} are read")
        if _WITHOUT_OPERATORS.fullmatch(key):
            return re.compile(rf"(.*\.)?({key})$")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets like `[[`, which may change one day
                parsed = _parser.parse(rf"(.*\.)?({key})$")
            strange = _not_understood(parsed)
        except (re.error, OverflowError, RecursionError) as exc:
            raise self._refusal(f"has {key[:80]!r}, which is no regular expression: {exc}") from exc
        if strange:
            raise self._refusal(
                f"has {key[:80]!r}, and {strange} in regular expressions is not supported: write "
                "the names of the modules out"
            )
        return parsed

    def _refusal(self, problem: str) -> Exception:
        return refusal(
            f"{self._setting} in adapter_config.json of {self._path} {problem}",
            self._path,
            setting=self._setting,
        )


class _TooManyStepsError(Exception):
    """The expressions of an adapter need more steps than one may cost."""


@dataclass
class _Steps:
    left: int

    def count(self, number: int = 1) -> None:
        self.left -= number
        if self.left < 0:
            raise _TooManyStepsError


@dataclass
class _Name:
    """A name to match. Positions are bits of an integer: bit 3 is before the fourth character."""

    text: str
    steps: _Steps
    by_class: dict[Any, int] = field(default_factory=dict)

    def matches(self, expression: Any) -> bool:
        if isinstance(expression, re.Pattern):
            self.steps.count(1 + len(self.text) * len(expression.pattern) // 1024)
            return expression.match(self.text) is not None
        return bool(self.advance(expression, 1))

    def advance(self, parsed: Any, positions: int) -> int:
        """All positions after what was parsed, begun at any of these positions."""
        for operator, argument in parsed:
            self.steps.count()
            positions = self._advance_one(operator, argument, positions)
            if not positions:
                return 0
        return positions

    def _advance_one(self, operator: Any, argument: Any, positions: int) -> int:
        if operator is regex.SUBPATTERN:
            return self.advance(argument[3], positions)
        if operator is regex.BRANCH:
            reached = 0
            for branch in argument[1]:
                reached |= self.advance(branch, positions)
            return reached
        if operator is regex.MAX_REPEAT or operator is regex.MIN_REPEAT:
            least, most, repeated = argument
            return self._repeat(int(least), int(most), repeated, positions)
        if operator is regex.AT:
            is_start = argument in (regex.AT_BEGINNING, regex.AT_BEGINNING_STRING)
            return positions & (1 if is_start else 1 << len(self.text))
        return (positions & self._fitting(operator, argument)) << 1

    def _repeat(self, least: int, most: int, parsed: Any, positions: int) -> int:
        for _ in range(least):
            before, positions = positions, self.advance(parsed, positions)
            if positions in (0, before):  # it stays so, however often
                break
        reached = new = positions
        for _ in range(most - least):
            new = self.advance(parsed, new) & ~reached
            if not new:
                break
            reached |= new
        return reached

    def _fitting(self, operator: Any, argument: Any) -> int:
        """The positions before characters that fit."""
        key = (operator, argument if isinstance(argument, int) else id(argument))
        if key not in self.by_class:
            fitting = 0
            for place, char in enumerate(self.text):
                if _fits(char, operator, argument):
                    fitting |= 1 << place
            self.by_class[key] = fitting
        return self.by_class[key]


def _fits(char: str, operator: Any, argument: Any) -> bool:
    """Whether one character is what an expression for one character asks for."""
    if operator is regex.LITERAL:
        return ord(char) == int(argument)
    if operator is regex.NOT_LITERAL:
        return ord(char) != int(argument)
    if operator is regex.ANY:
        return char != "\n"
    if operator is regex.RANGE:
        return bool(argument[0] <= ord(char) <= argument[1])
    if operator is regex.CATEGORY:
        return _CATEGORIES[argument](char)
    is_negated = bool(argument) and argument[0][0] is regex.NEGATE
    return is_negated != any(_fits(char, *item) for item in argument[is_negated:])


def _not_understood(parsed: Any) -> str:
    """What of an expression cannot be followed here, or ""."""
    for operator, argument in parsed:
        if operator not in _UNDERSTOOD or (operator is regex.AT and argument not in _ANCHORS):
            return str(operator if operator is not regex.AT else argument).lower()
        if operator is regex.SUBPATTERN and (argument[1] or argument[2]):
            return "flags"
        inner: list[Any] = []
        if operator is regex.BRANCH:
            inner = argument[1]
        elif operator in (regex.SUBPATTERN, regex.MAX_REPEAT, regex.MIN_REPEAT):
            inner = [argument[-1]]
        for part in inner:
            if strange := _not_understood(part):
                return strange
    return ""
