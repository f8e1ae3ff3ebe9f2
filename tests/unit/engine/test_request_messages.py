"""Conversations and functions as OpenAI's clients send them, taken or refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.engine.messages import MAX_ARGUMENTS_BYTES, MAX_SCHEMA_BYTES, NO_PARAMETERS, Tools
from mlops.engine.request import parse_request
from mlops.errors import InvalidRequestError

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
TOOL = {"type": "function", "function": {"name": "f"}}


def messages_of(*messages: Any) -> tuple[Any, ...]:
    return tuple(parse_request({"messages": list(messages)}).messages)


def tools_of(**fields: Any) -> Tools | None:
    return parse_request({"messages": [USER], **fields}).tools


def refusal_of(data: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request(data)
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()
    assert caught.value.field.isprintable()
    return caught.value


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def test_a_conversation_with_calls_is_what_templates_take() -> None:
    assert messages_of(
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "Done", "tool_calls": None},
    ) == (
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "3"},
        {"role": "assistant", "content": "Done"},
    )


def test_a_call_without_arguments_has_none() -> None:
    call = {**CALL, "function": {"name": "f", "arguments": ""}}
    (message,) = messages_of({"role": "assistant", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def with_call(**fields: Any) -> list[Any]:
    return [USER, {"role": "assistant", "tool_calls": [CALL, {**CALL, **fields}]}]


def with_arguments(arguments: Any) -> list[Any]:
    return with_call(function={"name": "f", "arguments": arguments})


@pytest.mark.parametrize(
    ("messages", "field", "said"),
    [
        ([], "messages", "1 to 1024 messages"),
        ("hello", "messages", "not 'hello'"),
        (["hello"], "messages[0]", "role and content"),
        ([{"role": "user"}], "messages[0].content", "a list of parts, not None"),
        ([{"role": "user", "content": None}], "messages[0].content", "a list of parts, not None"),
        ([{"role": "assistant"}], "messages[0].content", "a list of parts, not None"),
        ([{"content": "a"}], "messages[0].role", "one of system"),
        ([{"role": "function", "content": ""}], "messages[0].role", "one of system"),
        ([{"role": ["x"], "content": ""}], "messages[0].role", "a list of 1"),
        ([USER, {"role": "user", "content": 1}], "messages[1].content", "a text or a list of"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "surrogate"),
        ([{**USER, "name": ""}], "messages[0].name", "not empty"),
        ([{**USER, "audio": {}}], "messages[0].audio", "role, content, name in a message of the"),
        ([{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls", "of the role user"),
        ([{**USER, "\ud800": 1}], "messages[0].\\ud800", "unknown field"),
        ([{**USER, "x" * 999: 1}], f"messages[0].{'x' * 64}", "unknown field"),
        ([{"role": "user", "content": []}], "messages[0].content", "a list of parts"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]", "type and text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
            "must be 'text', the only kind of content that this model takes, not 'image_url'",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            "messages[0].content[0].text",
            "a text, not 1",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}],
            "messages[0].content[0].text",
            "surrogate",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}],
            "messages[0].content[0].cache_control",
            "allowed are type, text",
        ),
        ([{"role": "tool", "content": "3"}], "messages[0].tool_call_id", "not empty, not None"),
        (
            [{"role": "assistant", "tool_calls": []}],
            "messages[0].tool_calls",
            "1 to 128 calls",
        ),
        (with_call(id=None), "messages[1].tool_calls[1].id", "not empty"),
        (with_call(type="custom"), "messages[1].tool_calls[1].type", "'function', not 'custom'"),
        (with_call(index=1), "messages[1].tool_calls[1].index", "unknown field messages[1]"),
        (with_call(function=3), "messages[1].tool_calls[1].function", "name and arguments"),
        (
            with_call(function={"name": 3, "arguments": "{}"}),
            "messages[1].tool_calls[1].function.name",
            "not 3",
        ),
        *(
            (with_arguments(text), "messages[1].tool_calls[1].function.arguments", said)
            for text, said in [
                ("{", "the JSON text of an object, not '{'"),
                ("[1]", "the JSON text of an object"),
                ('{"x": NaN}', "the JSON text of an object"),
                ('{"x": ' + "9" * 5000 + "}", "the JSON text of an object"),
                ('{"x": ' + "[" * 100_000, "the JSON text of an object"),
                ('{"x": 1e999}', "not JSON"),
                ('{"x": "\\ud800"}', "surrogate"),
                ('{"x": ' + "[" * 70 + "]" * 70 + "}", "more than 64 deep"),
                ("x" * (MAX_ARGUMENTS_BYTES + 1), "at most 1048576 bytes"),
                ({"x": 1}, "an object with 1 field"),
                (None, "not None"),
            ]
        ),
    ],
)
def test_a_bad_message_is_refused_by_the_name_of_its_field(
    messages: Any, field: str, said: str
) -> None:
    error = refusal_of({"messages": messages})
    assert error.field == field
    assert said in error.message
    assert field in error.message


def test_functions_are_what_templates_take() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    function = {"name": "g", "description": "Gives.", "parameters": schema, "strict": True}
    tools = tools_of(tools=[TOOL, {"type": "function", "function": function}])
    assert tools == Tools(
        (
            {"type": "function", "function": {"name": "f", "parameters": NO_PARAMETERS}},
            {"type": "function", "function": function},
        )
    )
    assert tools.names == {"f", "g"}
    assert tools.has_strict


def test_what_may_be_chosen() -> None:
    named = {"type": "function", "function": {"name": "f"}}
    for choice, expected in (("auto", ("auto", None)), ("required", ("required", None))):
        tools = tools_of(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
        assert tools is not None
        assert ((tools.choice, tools.name), tools.is_parallel) == (expected, False)
    tools = tools_of(tools=[TOOL], tool_choice=named)
    assert tools is not None
    assert (tools.choice, tools.name, tools.is_parallel) == ("required", "f", True)
    assert tools_of(tools=[TOOL], tool_choice="none") is None
    assert tools_of(tool_choice="none") is None
    assert tools_of(tools=None, tool_choice=None, parallel_tool_calls=None) is None


def with_function(**fields: Any) -> list[Any]:
    return [TOOL, {"type": "function", "function": {"name": "g", **fields}}]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"tools": []}, "tools", "1 to 128 functions"),
        ({"tools": [TOOL] * 129}, "tools", "not a list of 129"),
        ({"tools": {}}, "tools", "an object with 0 fields"),
        ({"tools": [TOOL, TOOL]}, "tools", "every function once"),
        ({"tools": ["f"]}, "tools[0]", "type and function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "not 'web_search'"),
        ({"tools": [{**TOOL, "x": 1}]}, "tools[0].x", "unknown field"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "name and parameters"),
        ({"tools": with_function(name="a b")}, "tools[1].function.name", "letters, digits"),
        ({"tools": with_function(name="a\n")}, "tools[1].function.name", "letters, digits"),
        ({"tools": with_function(name="a" * 65)}, "tools[1].function.name", "1 to 64"),
        ({"tools": with_function(name="é")}, "tools[1].function.name", "letters"),
        ({"tools": with_function(description=1)}, "tools[1].function.description", "a text"),
        ({"tools": with_function(strict=1)}, "tools[1].function.strict", "true or false"),
        ({"tools": with_function(arguments={})}, "tools[1].function.arguments", "unknown field"),
        *(
            ({"tools": with_function(parameters=value)}, "tools[1].function.parameters", said)
            for value, said in [
                ([], "a JSON schema of the type object"),
                ({"type": "string"}, "a JSON schema of the type object"),
                ({"type": ["object"]}, "a JSON schema of the type object"),
                (deep(70), "more than 64 deep"),
                (deep(5000), "more than 64 deep"),
                ({"default": float("nan")}, "is not JSON"),
                ({"default": {1, 2}}, "is not JSON"),
                ({"title": "\ud800"}, "surrogate"),
                ({"title": "é" * MAX_SCHEMA_BYTES}, "more than 65536 bytes"),
                ({"x-guidance": {}}, "unknown keyword"),
            ]
        ),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "one of none, auto, required"),
        ({"tools": [TOOL], "tool_choice": 1}, "tool_choice", "not 1"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.type",
            "not 'allowed_tools'",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
            "tool_choice.name",
            "allowed are type, function",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
            "one of the functions in tools, not 'g'",
        ),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        ({"tool_choice": "auto"}, "tool_choice", "goes with tools only"),
        ({"tool_choice": "required"}, "tool_choice", "goes with tools only"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "goes with tools only"),
    ],
)
def test_bad_tools_are_refused_by_the_name_of_their_field(
    fields: dict[str, Any], field: str, said: str
) -> None:
    error = refusal_of({"messages": [USER], **fields})
    assert error.field == field
    assert said in error.message


def test_tools_need_a_conversation() -> None:
    assert refusal_of({"prompt": "a", "tools": [TOOL]}).field == "tools"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
known = st.sampled_from(
    ["role", "content", "name", "tool_calls", "tool_call_id", "type", "function", "text", "id"]
)
words = st.sampled_from(["user", "assistant", "tool", "text", "function", "{}", "f"])
objects = st.recursive(
    words | json_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known, inner, max_size=5),
    max_leaves=12,
)


@given(st.lists(objects, max_size=3), st.lists(objects, max_size=3), objects)
def test_whatever_comes_is_taken_or_refused(messages: Any, tools: Any, choice: Any) -> None:
    try:
        parse_request({"messages": messages, "tools": tools or None, "tool_choice": choice})
    except InvalidRequestError as exc:
        assert len(exc.message) < 400
