from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from mlops.serving.http.bodies import parse_json_object


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"text": "a"} trailing',
        b"[1]",
        b'"text"',
        b"null",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_bad_body_is_refused(body: bytes) -> None:
    with pytest.raises(HTTPException) as refused:
        parse_json_object(body)
    assert refused.value.status_code == 400
    assert len(refused.value.detail) < 300


@given(
    st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e9, 1e9)
    )
)
def test_a_good_body_is_what_was_sent(fields: dict[str, object]) -> None:
    assert parse_json_object(json.dumps(fields).encode()) == fields


@given(st.binary(max_size=64))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    try:
        assert isinstance(parse_json_object(body), dict)
    except HTTPException as refused:
        assert refused.status_code == 400
