"""A conversation and the functions that it may call, as OpenAI's clients send them, checked.

What comes out is what chat templates take: every content a text, and the arguments of earlier calls
as objects, which templates write in the model's own form. Nothing here imports MLX.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from mlops.engine.fields import check_flag, check_names, invalid, is_encodable, is_longer, show
from mlops.engine.response_format import MAX_SCHEMA_BYTES, OPTIONS
from mlops.errors import InvalidRequestError

ROLES = ("system", "user", "assistant", "tool", "developer")
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
TOOL_CHOICES = ("none", "auto", "required")
MAX_MESSAGES = 1024
MAX_TOOLS = 128
MAX_CALLS = 128
"""Calls in one message of the conversation."""
MAX_ARGUMENTS_BYTES = 1024 * 1024
MAX_DEPTH = 64
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
NAME_RULE = "a text of 1 to 64 letters, digits, _ and -"


@dataclass(frozen=True)
class Tools:
    """The functions that a request offers to the model.

    Attributes:
        functions: each as templates take it: `{"type": "function", "function": {"name",
            "parameters", ...}}`; `parameters` is always there.
        choice: `auto` lets the model decide, `required` makes it call one.
        name: of the function that it must call, with `required`; None leaves the choice to it.
        is_parallel: whether an answer may have more than one call.
    """

    functions: tuple[Mapping[str, Any], ...]
    choice: Literal["auto", "required"] = "auto"
    name: str | None = None
    is_parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """What the functions are called."""
        return frozenset(tool["function"]["name"] for tool in self.functions)

    @property
    def has_strict(self) -> bool:
        """Whether a function's schema is promised to be kept."""
        return any(tool["function"].get("strict") for tool in self.functions)


def parse_messages(value: object) -> tuple[Mapping[str, Any], ...]:
    """Check a conversation.

    A message has `role`, `content` and perhaps `name`; one of an assistant may have `tool_calls`,
    one of a tool has `tool_call_id`. A field that is null is a field left out. Content in parts of
    text becomes one text, without anything between them.

    Raises:
        InvalidRequestError: names the field: `messages[3].tool_calls[0].function.name`.
    """
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_MESSAGES:
        raise invalid("messages", value, f"a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_parse_message(f"messages[{at}]", one) for at, one in enumerate(value))


def parse_tools(given: Mapping[str, Any]) -> Tools | None:
    """Check the fields `TOOL_FIELDS` of a request; none of them is null.

    With the choice `none`, the request is one without functions: the model is not told of them.

    Returns:
        None for a request without functions.

    Raises:
        InvalidRequestError: names the field.
    """
    choice, name = _parse_choice(given.get("tool_choice", "auto"))
    is_parallel = given.get("parallel_tool_calls", True)
    check_flag("parallel_tool_calls", is_parallel)
    if "tools" not in given:
        for field in TOOL_FIELDS:
            if field in given and given[field] != "none":
                raise InvalidRequestError(f"{field} goes with tools only", field)
        return None
    if "messages" not in given:
        raise InvalidRequestError("tools go with messages only", "tools")
    value = given["tools"]
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_TOOLS:
        raise invalid("tools", value, f"a list of 1 to {MAX_TOOLS} functions")
    functions = tuple(_parse_function(f"tools[{at}]", one) for at, one in enumerate(value))
    tools = Tools(functions, "auto" if choice == "auto" else "required", name, is_parallel)
    if len(tools.names) < len(functions):
        raise InvalidRequestError("tools must name every function once", "tools")
    if name is not None and name not in tools.names:
        raise InvalidRequestError(
            f"tool_choice.function.name must be one of the functions in tools, not {show(name)}",
            "tool_choice.function.name",
        )
    return None if choice == "none" else tools


def read_object(text: str) -> dict[str, Any]:
    """The object that a JSON text holds, if JSON can say it again.

    Raises:
        ValueError: it is no object, or not JSON as the standard has it: without NaN, not too deep,
            numbers of a size that can be read.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - what a text holds is its value
    return value


def _parse_message(name: str, message: object) -> Mapping[str, Any]:
    given = _fields(name, message, "an object with role and content")
    role = given.get("role")
    if role not in ROLES:
        raise invalid(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    allowed = ["role", "content", "name"]
    if role == "assistant":
        allowed.append("tool_calls")
    if role == "tool":
        allowed.append("tool_call_id")
    check_names(name, given, allowed, f" in a message of the role {role}")
    parsed: dict[str, Any] = {"role": role}
    if "content" in given:
        parsed["content"] = _parse_content(f"{name}.content", given["content"])
    elif "tool_calls" in given:
        parsed["content"] = ""  # a template may add it to other texts
    else:
        raise invalid(f"{name}.content", None, "a text or a list of parts")
    if "name" in given:
        parsed["name"] = _parse_text(f"{name}.name", given["name"])
    if role == "tool":
        identifier = f"{name}.tool_call_id"
        parsed["tool_call_id"] = _parse_text(identifier, given.get("tool_call_id"))
    if "tool_calls" in given:
        calls, name = given["tool_calls"], f"{name}.tool_calls"
        if not isinstance(calls, list | tuple) or not 1 <= len(calls) <= MAX_CALLS:
            raise invalid(name, calls, f"a list of 1 to {MAX_CALLS} calls")
        parsed["tool_calls"] = [_parse_call(f"{name}[{at}]", one) for at, one in enumerate(calls)]
    return parsed


def _parse_content(name: str, value: object) -> str:
    if isinstance(value, str):
        return _check_encodable(name, value)
    if not isinstance(value, list | tuple) or not value:
        raise invalid(name, value, "a text or a list of parts")
    texts = []
    for at, part in enumerate(value):
        fields = _fields(f"{name}[{at}]", part, "an object with type and text")
        if fields.get("type") != "text":
            raise InvalidRequestError(
                f"{name}[{at}].type must be 'text', the only kind of content that this model "
                f"takes, not {show(fields.get('type'))}",
                f"{name}[{at}].type",
            )
        check_names(f"{name}[{at}]", fields, ("type", "text"))
        text = fields.get("text")
        if not isinstance(text, str):
            raise invalid(f"{name}[{at}].text", text, "a text")
        texts.append(_check_encodable(f"{name}[{at}].text", text))
    return "".join(texts)


def _parse_call(name: str, value: object) -> dict[str, Any]:
    given = _fields(name, value, "an object with id, type and function")
    check_names(name, given, ("id", "type", "function"))
    identifier = _parse_text(f"{name}.id", given.get("id"))
    _check_type(name, given)
    function = _fields(
        f"{name}.function", given.get("function"), "an object with name and arguments"
    )
    check_names(f"{name}.function", function, ("name", "arguments"))
    called = _parse_text(f"{name}.function.name", function.get("name"))
    return {
        "id": identifier,
        "type": "function",
        "function": {
            "name": called,
            "arguments": _parse_arguments(f"{name}.function.arguments", function.get("arguments")),
        },
    }


def _parse_arguments(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, str) or len(value) > MAX_ARGUMENTS_BYTES:
        raise invalid(name, value, f"JSON text of at most {MAX_ARGUMENTS_BYTES} bytes")
    if not value.strip():
        return {}  # what models and clients write for a call without arguments
    try:
        arguments = read_object(value)
    except ValueError as exc:
        raise invalid(name, value, "the JSON text of an object") from exc
    _check_json(name, arguments, MAX_ARGUMENTS_BYTES)
    return arguments


def _parse_function(name: str, value: object) -> dict[str, Any]:
    given = _fields(name, value, "an object with type and function")
    check_names(name, given, ("type", "function"))
    _check_type(name, given)
    name = f"{name}.function"
    function = _fields(name, given.get("function"), "an object with name and parameters")
    check_names(name, function, ("name", "description", "parameters", "strict"))
    called = function.get("name")
    if not isinstance(called, str) or not NAME.fullmatch(called):
        raise invalid(f"{name}.name", called, NAME_RULE)
    parsed: dict[str, Any] = {"name": called}
    if "description" in function:
        description = function["description"]
        if not isinstance(description, str):
            raise invalid(f"{name}.description", description, "a text")
        parsed["description"] = _check_encodable(f"{name}.description", description)
    # Templates and parsers look into it without asking whether it is there.
    parameters = function.get("parameters", NO_PARAMETERS)
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise invalid(f"{name}.parameters", parameters, "a JSON schema of the type object")
    if OPTIONS in parameters:
        raise InvalidRequestError(
            f"{name}.parameters has the unknown keyword {OPTIONS!r}", f"{name}.parameters"
        )
    _check_json(f"{name}.parameters", parameters, MAX_SCHEMA_BYTES)
    parsed["parameters"] = parameters
    if "strict" in function:
        check_flag(f"{name}.strict", function["strict"])
        parsed["strict"] = function["strict"]
    return {"type": "function", "function": parsed}


def _parse_choice(value: object) -> tuple[str, str | None]:
    """The choice, and the function's name when one is named."""
    allowed = f"one of {', '.join(TOOL_CHOICES)}, or an object that names a function"
    if isinstance(value, str):
        if value not in TOOL_CHOICES:
            raise invalid("tool_choice", value, allowed)
        return value, None
    given = _fields("tool_choice", value, allowed)
    check_names("tool_choice", given, ("type", "function"))
    _check_type("tool_choice", given)
    function = _fields("tool_choice.function", given.get("function"), "an object with name")
    check_names("tool_choice.function", function, ("name",))
    return "required", _parse_text("tool_choice.function.name", function.get("name"))


def _fields(name: str, value: object, allowed: str) -> dict[str, Any]:
    """The fields of an object that are not null."""
    if not isinstance(value, Mapping):
        raise invalid(name, value, allowed)
    return {field: one for field, one in value.items() if one is not None}


def _check_type(name: str, given: Mapping[str, Any]) -> None:
    if given.get("type") != "function":
        raise invalid(f"{name}.type", given.get("type"), "'function'")


def _parse_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(name, value, "a text that is not empty")
    return _check_encodable(name, value)


def _check_encodable(name: str, text: str) -> str:
    if not is_encodable(text):
        raise InvalidRequestError(f"{name} has half a surrogate pair, which is no character", name)
    return text


def _check_json(name: str, value: object, max_bytes: int) -> None:
    """Refuse what templates, and a grammar's compiler, should not get to see."""
    if is_longer(value, max_bytes):  # before it is written, which nothing interrupts
        raise InvalidRequestError(f"{name} has more than {max_bytes} bytes as JSON", name)
    if _is_deeper(value, MAX_DEPTH):
        raise InvalidRequestError(f"{name} is nested more than {MAX_DEPTH} deep", name)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise InvalidRequestError(f"{name} is not JSON: {exc}", name) from exc
    if not is_encodable(text):
        raise InvalidRequestError(f"{name} has half a surrogate pair, which is no character", name)
    if len(text.encode()) > max_bytes:
        raise InvalidRequestError(f"{name} has more than {max_bytes} bytes as JSON", name)


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for one in level
            if isinstance(one, Mapping | list | tuple)
            for inner in (one.values() if isinstance(one, Mapping) else one)
        ]
        if not level:
            return False
    return True


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
