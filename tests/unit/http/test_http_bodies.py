from __future__ import annotations

import asyncio
import gc
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from mlops.serving.http import bodies
from mlops.serving.http.bodies import parse_json_object, read_json_object


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
        b'{"temperature": -1E+0999}',
        b'{"temperature": 0.00001e314}',
        b'{"temperature": ' + b"9" * 400 + b".0}",
        b'{"temperature": ' + b"9" * 210 + b"e99}",
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\ud800\\ud800"}',
        b'{"\\udc00": 1}',
        b'{"text": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"text": "a"}',
        '{"text": "a"}'.encode("utf-16"),
        b'{"text": "\x00"}',
        b"{'text': 'a'}",
        b'{"text": "a",}',
        b'{"max_tokens": 0x10}',
        b'{"max_tokens": 010}',
        b'{"max_tokens": +1}',
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"text": ' + b"[" * 201 + b"]" * 201 + b"}",
        b'{"text":' * 100_000,
    ],
)
def test_a_bad_body_is_refused(body: bytes) -> None:
    with pytest.raises(HTTPException) as refused:
        parse_json_object(body)
    assert refused.value.status_code == 400
    assert len(refused.value.detail) < 300


@given(
    st.dictionaries(
        st.text(),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text()
        | st.floats(allow_nan=False, allow_infinity=False),
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


@given(st.integers(0, 400), st.integers(-400, 400), st.sampled_from("eE"))
def test_numbers_are_finite_or_refused(digits: int, exponent: int, sign: str) -> None:
    body = f'{{"n": 1{"7" * digits}{sign}{exponent}}}'
    value = float(body[6:-1])
    if math.isinf(value):
        with pytest.raises(HTTPException):
            parse_json_object(body.encode())
    else:
        assert parse_json_object(body.encode()) == {"n": value}


def test_the_last_of_a_name_counts() -> None:
    assert parse_json_object(b'{"n": 1, "n": 2}') == {"n": 2}


# Reading.


class Sender:
    """A request whose body comes as a test wants it."""

    def __init__(self, *chunks: bytes | None, is_whole: bool = True, **headers: str) -> None:
        self.chunks = chunks
        self.is_whole = is_whole
        self.num_read = 0
        raw = {"content_type": "application/json", **headers}
        self.headers = [(k.replace("_", "-").encode(), v.encode()) for k, v in raw.items()]

    async def receive(self) -> Any:
        if self.num_read == len(self.chunks):
            await asyncio.Event().wait()  # it says no more, and stays
        chunk = self.chunks[self.num_read]
        self.num_read += 1
        if chunk is None:
            return {"type": "http.disconnect"}
        is_last = self.is_whole and self.num_read == len(self.chunks)
        return {"type": "http.request", "body": chunk, "more_body": not is_last}

    def read(self, max_bytes: int = 1000) -> dict[str, Any]:
        request = Request({"type": "http", "headers": self.headers}, self.receive)
        return asyncio.run(read_json_object(request, max_bytes))


def test_a_body_in_pieces() -> None:
    assert Sender(b'{"te', b'xt": ', b'"a"}').read() == {"text": "a"}


@pytest.mark.parametrize("declared", ["1001", "9" * 19, "9" * 4301])
def test_a_body_that_is_announced_too_large_is_not_read(declared: str) -> None:
    sender = Sender(b'{"text": "a"}', content_length=declared)
    with pytest.raises(HTTPException) as refused:
        sender.read()
    assert (refused.value.status_code, sender.num_read) == (413, 0)
    assert refused.value.headers == {"Connection": "close"}


@pytest.mark.parametrize("declared", ["5", "-5", "", "x", "\u00b2"])
def test_a_body_that_is_larger_than_announced_is_left(declared: str) -> None:
    sender = Sender(*[b" " * 100] * 50, content_length=declared)
    with pytest.raises(HTTPException) as refused:
        sender.read()
    assert (refused.value.status_code, sender.num_read) == (413, 11)


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": ""},
        {"content_type": "application/json-patch+json"},
        {"content_type": "application/jsonx"},
        {"content_encoding": "gzip"},
    ],
)
def test_what_is_not_plain_json_is_not_read(headers: dict[str, str]) -> None:
    sender = Sender(b"{}", **headers)
    with pytest.raises(HTTPException) as refused:
        sender.read()
    assert (refused.value.status_code, sender.num_read) == (415, 0)


def test_a_body_that_crawls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "READ_TIMEOUT_S", 0.05)
    sender = Sender(b"{", is_whole=False)
    with pytest.raises(HTTPException) as refused:
        sender.read()
    assert refused.value.status_code == 408
    assert refused.value.headers == {"Connection": "close"}


def test_a_client_that_leaves_while_it_sends() -> None:
    with pytest.raises(ClientDisconnect):
        Sender(b"{", None).read()


def test_a_large_body_does_not_set_the_collector_going() -> None:
    body = b'{"input": [' + b"[]," * 300_000 + b"[]]}"
    phases: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        phases.append(phase)

    gc.callbacks.append(note)
    try:
        parsed = parse_json_object(body)
    finally:
        gc.callbacks.remove(note)
    assert len(parsed["input"]) == 300_001
    assert phases.count("start") < 10  # else one for every few hundred lists
    assert gc.isenabled()


def test_a_large_body_with_numbers_at_the_limit() -> None:
    numbers = b"1e307, " * 20_000
    body = b'{"input": [' + numbers + b"1e308]}"
    assert Sender(body).read(len(body))["input"][-1] == 1e308
    body = b'{"input": [' + numbers + b"1e309]}"
    with pytest.raises(HTTPException, match="1e309 is out of range"):
        Sender(body).read(len(body))


def test_a_body_of_too_many_lists_is_refused() -> None:
    numbers = b'{"input": [' + b"[1, 2], " * 40 + b"[1, 2]]}"
    assert len(Sender(numbers).read(1000)["input"]) == 41
    with pytest.raises(HTTPException, match="more than 125 lists and objects"):
        Sender(b'{"input": ' + b"[" * 150 + b"]" * 150 + b"}").read(1000)
