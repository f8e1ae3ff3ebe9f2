"""What `mlops predict` says of answers that are not a service's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlops.cli.serve import ask
from mlops.errors import ServiceError


@contextmanager
def answering(status: int, content: bytes) -> Iterator[str]:
    """A server that answers everything so; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

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
        ask(url, {"input": 1}, timeout_s=30)
    assert said in raised.value.message
    assert len(raised.value.message) < 300
    assert raised.value.message.isprintable()
