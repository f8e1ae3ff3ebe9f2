"""Bodies that take long to parse: the event loop goes on, and what comes out is the same."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from live_server import LONG_S, LiveServer, wait_for
from mlops.serving.http import RunnerHost
from mlops.serving.http.bodies import parse_json_object, parse_slowly
from mlops.serving.runner import MLXModelRunner
from tiny_models import write_language_model

LIMIT = 4 * 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_language_model(tmp_path_factory.mktemp("models") / "tiny")
    with LiveServer(RunnerHost(lambda: MLXModelRunner(folder))) as one:
        yield one


def names(number: int, value: str = "1") -> str:
    return ",".join(f'"{n:x}":{value}' for n in range(number))


BODIES: dict[str, str] = {
    "names": f"{{{names(350_000)}}}",
    "names with spaces": "{" + ",".join(f'"{n:x}" :1' for n in range(300_000)) + "}",
    "null names": f'{{"prompt":"a",{names(280_000, "null")}}}',
    "names within": f'{{"prompt":"a","logit_bias":{{{names(350_000)}}}}}',
    "objects": '{"prompt":[' + ",".join(f'{{"{n:x}":1}}' for n in range(300_000)) + "]}",
    "a schema": '{"prompt":"a","response_format":{"type":"json_schema","json_schema":{"name":"a",'
    f'"schema":{{{names(300_000)}}}}}}}}}',
    "a tool": '{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":'
    f'{{"name":"f","parameters":{{{names(300_000)}}}}}}}]}}',
    "names and a number out of range": f'{{{names(300_000)},"a":1e999}}',
    "stops": '{"prompt":"a","stop":[' + ",".join(['"a"'] * 800_000) + "]}",
    "tools": '{"messages":[{"role":"user","content":"a"}],"tools":['
    + ",".join(['{"type":"function"}'] * 190_000)
    + "]}",
    "messages": '{"messages":[' + ",".join(['{"role":"user"}'] * 250_000) + "]}",
    "lists": '{"a":' + "[" * 500_000 + "]" * 500_000 + "}",
    "many lists": '{"prompt":[' + ",".join(["[]     "] * 500_000) + "]}",
    "an integer": '{"prompt":"a","seed":' + "9" * 4_000_000 + "}",
    "a number": '{"prompt":"a","temperature":99.' + "9" * 4_000_000 + "}",
    "a name": '{"' + "a" * 4_000_000 + '":1}',
    "one name": '{"prompt":"a",' + ",".join(['"x":1'] * 600_000) + "}",
}


@pytest.mark.parametrize("path", ["/predict", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("name", BODIES)
def test_a_body_made_to_be_slow_is_refused_shortly(
    server: LiveServer, name: str, path: str
) -> None:
    assert len(BODIES[name]) <= LIMIT
    with httpx.Client(trust_env=False, timeout=LONG_S) as client:
        response = client.post(
            server.url + path,
            content=BODIES[name],
            headers={"Content-Type": "application/json"},
        )
    assert response.status_code in {400, 422}
    assert len(response.content) < 1000


def test_the_event_loop_goes_on_while_names_are_parsed(server: LiveServer) -> None:
    """Others are answered between the beginning and the end of it, and not only then."""
    answered: list[float] = []
    times: list[float] = []

    def post() -> None:
        with httpx.Client(trust_env=False, timeout=LONG_S) as client:
            times.append(time.monotonic())
            client.post(
                server.url + "/predict",
                content=BODIES["names"],
                headers={"Content-Type": "application/json"},
            )
            times.append(time.monotonic())

    thread = threading.Thread(target=post)
    with httpx.Client(trust_env=False, timeout=LONG_S) as client:
        thread.start()
        wait_for(lambda: times)
        while thread.is_alive():
            client.get(server.url + "/livez").raise_for_status()
            answered.append(time.monotonic())
    assert sum(times[0] < one < times[1] for one in answered) > 10


# Both parsers take the same, and refuse the same.


def outcome(parse: Any, body: bytes) -> Any:
    try:
        return parse(body)
    except HTTPException as exc:
        return exc.status_code


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON), st.sampled_from([None, 1]), st.booleans())
def test_the_slow_parser_is_the_fast_one(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    body = text.encode("utf-8", "surrogatepass")
    assert outcome(parse_slowly, body) == outcome(parse_json_object, body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"1",
        b"{}",
        b" {} ",
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b'{"a":1,}',
        b'{"a":01}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":-0.0}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"a":"\\ud83d\\ude00"}',
        b'{"a":"\n"}',
        b'{"a":"\\x"}',
        b"{'a':1}",
        b'{"a":1,"a":2}',
        b'{"a":' + b"9" * 4300 + b"}",
        b'{"a":' + b"9" * 4301 + b"}",
        b'{"a":' + b"[" * 190 + b"]" * 190 + b"}",
        b'{"a":' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        "{}".encode("utf-16"),
    ],
)
def test_both_are_equally_strict(body: bytes) -> None:
    assert outcome(parse_slowly, body) == outcome(parse_json_object, body)
