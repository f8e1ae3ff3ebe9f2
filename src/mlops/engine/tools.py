"""Calls of functions in what a model says, found and read.

    text as it comes -> `ToolReader` -> what is said, and complete calls

Each family of models writes calls in its own form, between markers. Which one a model has, and what
stands between the markers, mlx-lm's tool parsers know; finding the markers in a text that comes in
pieces is done here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlops.engine.fields import is_encodable
from mlops.engine.messages import Tools, read_object
from mlops.engine.text import TextMatcher

MAX_CALL_CHARACTERS = 64 * 1024
"""A longer call is no call."""

MAX_OCCURRENCES: Mapping[str, Mapping[str, int]] = {
    "function_gemma": {"call:": 64},
    "gemma4": {"call:": 4, "{": 256},
    "glm47": {"<arg_key>": 32, "</arg_key>": 32},
    "kimi_k3": {"<|open|>": 64},
    "longcat": {"<longcat_arg_key>": 32, "</longcat_arg_key>": 32},
    "muse_spark": {"<atem:": 64},
}
"""How often these may be in a call, by parser. Their regular expressions begin anew at each, and
read to the end when nothing closes it: seconds and minutes for a text that a model was made to
repeat, during which nothing else runs."""

PARSERS = "mlx_lm.tool_parsers."
JSON_FORMS = ("json_tools", "mistral")
"""Parsers whose calls are JSON between markers."""


@dataclass(frozen=True)
class ToolCall:
    """A complete call of one of the functions that the request offers.

    Attributes:
        name: of the function.
        arguments: the JSON text of an object. It is not checked against the function's schema.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolForm:
    """How one model writes calls.

    Attributes:
        start, end: the markers around a call; without an `end`, a call ends where the next begins.
        parse: what stands between them, and the functions, to one call or a list of calls, each a
            mapping with `name` and `arguments`; raises anything when it is no call.
        parser: the name of mlx-lm's parser.
    """

    start: str
    end: str
    parse: Callable[[str, list[Mapping[str, Any]]], Any]
    parser: str = ""

    @property
    def is_json(self) -> bool:
        """Whether a call is JSON: an end marker within a JSON text does not end it."""
        return self.parser in JSON_FORMS


def find_form(tokenizer: Any) -> ToolForm | None:
    """The form that mlx-lm found for this model; None when it has none.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
    """
    if not tokenizer.has_tool_calling:
        return None
    parse = tokenizer.tool_parser
    return ToolForm(
        tokenizer.tool_call_start,
        tokenizer.tool_call_end or "",
        parse,
        parse.__module__.removeprefix(PARSERS),
    )


@dataclass(frozen=True)
class Said:
    """What a piece of text was.

    Attributes:
        text: what is said to the reader.
        calls: complete calls.
    """

    text: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, later: Said) -> Said:
        return Said(self.text + later.text, self.calls + later.calls)


class ToolReader:
    """Takes one answer's text apart as it comes. Use it in one thread.

    However the text is cut into pieces, what comes out is the same: the calls in their order, and
    all other text. A call that is cut off, too long, not to be read, or of a function that the
    request does not offer is text, with its markers. In an answer with calls, white space is left
    out at the end of the text, which is where models break lines around calls; so are the calls
    after the first, when there may be only one.
    """

    def __init__(self, form: ToolForm, tools: Tools) -> None:
        self.num_calls = 0
        """So many calls were complete."""
        self._form = form
        self._functions = list(tools.functions)
        self._names = tools.names
        self._max_calls = None if tools.is_parallel else 1
        self._start = TextMatcher(form.start)
        self._end = TextMatcher(form.end or form.start)
        # Outside of a call: what may be the beginning of a marker. Inside: the call so far.
        self._held: list[str] = []
        self._is_inside = False
        self._string = _JSONString() if form.is_json else None
        self._blank: list[str] = []  # white space that is text only if more text follows
        self._said: list[str] = []
        self._calls: list[ToolCall] = []

    def add(self, text: str) -> Said:
        """Take the next piece; returns what is now certain, often nothing."""
        at = 0
        while at < len(text):
            if not self._is_inside and not self._held:  # as nearly always
                begin = text.find(self._form.start[0], at)
                begin = len(text) if begin < 0 else begin
                self._say(text[at:begin])
                at = begin
            if at < len(text):
                self._add_character(text[at])
                at += 1
        return self._take()

    def finish(self, *, was_cut: bool) -> Said:
        """Return the rest at the end of the text.

        Args:
            was_cut: the model was not done, so what lacks its end marker may lack more.
        """
        if self._is_inside and not (was_cut and not self._form.is_json):
            self._end_call("")
        self._say("".join(self._held))
        self._held = []
        if self.num_calls:
            self._blank = []
        self._said += self._blank
        self._blank = []
        return self._take()

    def _take(self) -> Said:
        if not self._said and not self._calls:
            return NOTHING
        said = Said("".join(self._said), tuple(self._calls))
        self._said, self._calls = [], []
        return said

    def _say(self, text: str) -> None:
        stripped = text.rstrip()
        if stripped:
            self._said += [*self._blank, stripped]
            self._blank = []
        if len(stripped) < len(text):
            self._blank.append(text[len(stripped) :])

    def _add_character(self, character: str) -> None:
        self._held.append(character)
        if self._is_inside:
            self._add_inside(character)
            return
        is_marker = self._start.add(character)
        num_certain = len(self._held) - self._start.num_matched
        if num_certain:
            self._say("".join(self._held[:num_certain]))
            self._held = self._held[num_certain:]
        if is_marker:
            self._begin_call()

    def _begin_call(self) -> None:
        self._is_inside = True
        self._held = list(self._form.start)
        self._start.num_matched = self._end.num_matched = 0
        if self._string:
            self._string = _JSONString()

    def _add_inside(self, character: str) -> None:
        if self._string and self._string.add(character):
            self._end.num_matched = 0
        elif self._end.add(character):
            marker = self._end.text
            self._end_call(marker)
            if not self._form.end:
                self._begin_call()
            return
        if len(self._held) > MAX_CALL_CHARACTERS:
            self._leave()

    def _end_call(self, marker: str) -> None:
        """The call is complete, up to the end marker; without `marker` it ends with the text."""
        body = "".join(self._held[len(self._form.start) : len(self._held) - len(marker)])
        calls = self._read_calls(body)
        if not calls:
            # Without an end marker of its own, `marker` is the next call's start.
            self._held = [self._form.start, body, marker if self._form.end else ""]
            self._leave()
            return
        if self._max_calls is not None:
            calls = calls[: self._max_calls - self.num_calls]
        self.num_calls += len(calls)
        self._calls += calls
        self._held = []
        self._is_inside = False

    def _leave(self) -> None:
        """What was held is text after all."""
        self._say("".join(self._held))
        self._held = []
        self._is_inside = False

    def _read_calls(self, body: str) -> list[ToolCall]:
        """The calls; none when one of them is none of the request's functions."""
        limits = MAX_OCCURRENCES.get(self._form.parser, {})
        if any(body.count(text) > most for text, most in limits.items()):
            return []
        try:
            parsed = self._form.parse(body, self._functions)
            calls = [_to_call(one) for one in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # a parser meets whatever a model says
            return []
        return calls if all(call.name in self._names for call in calls) else []


class _JSONString:
    """Whether a JSON text is within a string."""

    __slots__ = ("_is_escaped", "_is_inside")

    def __init__(self) -> None:
        self._is_inside = False
        self._is_escaped = False

    def add(self, character: str) -> bool:
        """Take the next character; True when it belongs to a string."""
        if not self._is_inside:
            self._is_inside = character == '"'
            return self._is_inside
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character in '"\n':  # no string goes on after a line break: this one is broken
            self._is_inside = False
        return True


def _to_call(parsed: Any) -> ToolCall:
    """Raise anything unless this is a call."""
    name, arguments = parsed["name"], parsed.get("arguments", {})
    if isinstance(arguments, str):  # some models write the text of the object
        arguments = read_object(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError("not a call")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not is_encodable(text):
        text = json.dumps(arguments, allow_nan=False)
    return ToolCall(name, text)


NOTHING = Said()
