"""The field `response_format`: what is read, and what is refused by its name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.engine.request import GenerationRequest, parse_request
from mlops.engine.response_format import MAX_SCHEMA_BYTES, read_response_format
from mlops.errors import InvalidRequestError


def with_schema(schema: object, **others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **others}}


def test_text_is_no_form_and_json_object_is_an_object() -> None:
    assert parse_request({"text": "a"}).json_schema is None
    assert parse_request({"text": "a", "response_format": None}).json_schema is None
    assert parse_request({"text": "a", "response_format": {"type": "text"}}).json_schema is None
    request = parse_request({"text": "a", "response_format": {"type": "json_object"}})
    assert json.loads(request.json_schema or "") == {"type": "object"}


def test_a_schema_comes_through_as_it_is() -> None:
    schema = {"type": "object", "properties": {"ü": {"type": "string"}, "a": {"const": "🙂"}}}
    for others in ({}, {"strict": True, "description": "what it is"}, {"strict": None}):
        written = read_response_format(with_schema(schema, **others))
        assert written is not None
        assert json.loads(written) == schema
        assert list(json.loads(written)["properties"]) == ["ü", "a"]


@pytest.mark.parametrize(
    ("value", "field", "says"),
    [
        ("json", "response_format", "an object with type"),
        (["json_object"], "response_format", "an object with type"),
        ({}, "response_format.type", "one of text, json_object, json_schema"),
        ({"type": "xml"}, "response_format.type", "not 'xml'"),
        ({"type": ["text"]}, "response_format.type", "one of"),
        ({"type": "text", "schema": {}}, "response_format.schema", "unknown field"),
        ({"type": "json_object", "json_schema": {}}, "response_format.json_schema", "unknown"),
        ({"type": "json_schema"}, "response_format.json_schema", "an object with name"),
        (with_schema({}, more=1), "response_format.json_schema.more", "unknown field"),
        (with_schema({}, name=""), "response_format.json_schema.name", "1 to 64 characters"),
        (with_schema({}, name="a" * 65), "response_format.json_schema.name", "1 to 64"),
        (with_schema({}, name=3), "response_format.json_schema.name", "not 3"),
        (with_schema({}, strict="yes"), "response_format.json_schema.strict", "true or false"),
        (with_schema({}, description=1), "response_format.json_schema.description", "a text"),
        (with_schema(True), "response_format.json_schema.schema", "which is an object"),
        (with_schema(None), "response_format.json_schema.schema", "which is an object"),
        (with_schema({"const": math.nan}), "response_format.json_schema.schema", "JSON"),
        (with_schema({"const": {1, 2}}), "response_format.json_schema.schema", "JSON"),
        (with_schema({"const": "\ud800"}), "response_format.json_schema.schema", "surrogate"),
        (with_schema({"x-guidance": {}}), "response_format.json_schema.schema", "x-guidance"),
        (
            with_schema({"const": "a" * MAX_SCHEMA_BYTES}),
            "response_format.json_schema.schema",
            "at most 65536 bytes",
        ),
    ],
)
def test_a_wrong_field_is_named(value: Any, field: str, says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request({"text": "a", "response_format": value})
    assert caught.value.field == field
    assert field in caught.value.message
    assert says in caught.value.message
    assert len(caught.value.message) < 300


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "json_schema", "name", "schema", "strict"]) | st.text(),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_whatever_comes_is_read_or_refused(value: Any) -> None:
    try:
        written = read_response_format(value)
    except InvalidRequestError as exc:
        assert exc.field.startswith("response_format")
    else:
        assert written is None or isinstance(json.loads(written), dict)


def test_a_form_without_an_end_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        GenerationRequest((1,), ignore_eos=True, grammar="{}")
