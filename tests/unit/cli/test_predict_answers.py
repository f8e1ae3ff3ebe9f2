"""What `mlops predict` says of answers that are not a service's own."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlops.cli.asking import Service
from mlops.cli.predict import predict
from mlops.errors import ServiceError

EVENTS = "text/event-stream"


@contextmanager
def answering(
    status: int,
    content: bytes,
    kind: str = "application/json",
    for_streams: tuple[int, bytes] | None = None,
) -> Iterator[str]:
    """A server that answers everything so, or what asks for a stream otherwise; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["content-length"]))
            is_stream = json.loads(asked).get("stream", False)
            answer = for_streams if for_streams and is_stream else (status, content)
            self.send_response(answer[0])
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (429, b"Request dropped: the queue is full.\nmore", "cannot answer now (status 429): Req"),
        (500, b"", "cannot answer now (status 500)"),
        (404, b"Path '/x' not found.", "no service of this toolkit (status 404): Path '/x' not"),
        (502, b"<html>\n<body>bad gateway", "cannot answer now (status 502)"),
        (200, b"\x1b[2Jhello", "no service of this toolkit (status 200)"),
        (200, b"[]", "no service of this toolkit (status 200): []"),
        (503, b"a" * 5000, "cannot answer now (status 503): " + "a" * 200),
    ],
)
def test_an_answer_of_something_else_is_named(status: int, content: bytes, said: str) -> None:
    with answering(status, content) as url, pytest.raises(ServiceError) as raised:
        Service(url, 30).predict({"input": 1})
    assert said in raised.value.message
    assert len(raised.value.message) < 300
    assert raised.value.message.isprintable()


def events(*data: str) -> bytes:
    return "".join(f"data: {one}\n\n" for one in data).encode()


def test_a_stream_gives_its_events_as_they_come() -> None:
    content = events('{"index": 0, "text": "Hel"}', '{"index": 0, "text": "lo"}', "[DONE]")
    with answering(200, content, EVENTS) as url:
        texts = [event["text"] for event in Service(url, 30).events("/predict", {})]
    assert texts == ["Hel", "lo"]


@pytest.mark.parametrize(
    ("status", "content", "kind", "said"),
    [
        (200, events('{"text": "Hel"}'), EVENTS, "broke off in the middle of its answer"),
        (200, events('{"error": {"message": "no time left"}}'), EVENTS, "refused: no time left"),
        (200, events("{"), EVENTS, "no service of this toolkit"),
        (200, b'{"prediction": "Hello"}', "application/json", "no service of this toolkit"),
        (422, b'{"error": {"message": "odd"}}', "application/json", "refused: odd"),
        (404, b"not here", "text/plain", "no service of this toolkit (status 404): not here"),
    ],
)
def test_what_is_wrong_with_a_stream(status: int, content: bytes, kind: str, said: str) -> None:
    with answering(status, content, kind) as url, pytest.raises(ServiceError) as raised:
        list(Service(url, 30).events("/predict", {"text": "Hello"}))
    assert said in raised.value.message


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_model_without_text_answers_in_one_piece_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_stream = b'{"error": {"type": "NotFound", "message": "this model generates no text"}}'
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with answering(200, b'{"prediction": [1, 2]}', for_streams=(404, no_stream)) as url:
        predict("Hello", url=url)
        assert terminal.getvalue() == "[1, 2]\n"
        with pytest.raises(ServiceError, match="this model generates no text"):
            predict("Hello", url=url, stream=True)
