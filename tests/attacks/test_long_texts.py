"""Texts of megabytes: what cannot fit is refused at once, and what may fit holds nobody up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedding_models import write_embedding_model
from live_server import LONG_S, LiveServer, wait_for
from mlops.serving.http import RunnerHost
from mlops.serving.runner import MLXModelRunner
from mlops.serving.runner.mlx import LONG_PROMPT
from tool_models import write_tool_model

HUGE = "no room " * 500_000
CONTEXT_TOKENS = 200_000
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


class WatchedTokenizer:
    """The model's tokenizer: notes how long the texts are, and waits before it tokenizes long ones
    while `is_open` is not set."""

    def __init__(self, tokenizer: Any) -> None:
        self._wrapped = tokenizer
        self._tokenizer = tokenizer._tokenizer
        self.lengths: list[int] = []
        self.is_open = threading.Event()
        self.is_open.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __len__(self) -> int:
        return len(self._wrapped)

    def encode(self, text: str, **options: Any) -> Any:
        self.lengths.append(len(text))
        if len(text) > LONG_PROMPT:
            assert self.is_open.wait(LONG_S)
        return self._wrapped.encode(text, **options)


def with_context(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_TOKENS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def serve(folder: Path) -> Iterator[LiveServer]:
    with LiveServer(RunnerHost(lambda: MLXModelRunner(folder))) as server:
        runner: Any = server.host.runner
        runner.model.tokenizer = WatchedTokenizer(runner.model.tokenizer)
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("models") / "tiny", "json_tools")
    yield from serve(with_context(folder))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_embedding_model(tmp_path_factory.mktemp("models") / "tiny")
    yield from serve(with_context(folder))


def tokenizer_of(server: LiveServer) -> WatchedTokenizer:
    runner: Any = server.host.runner
    tokenizer: WatchedTokenizer = runner.model.tokenizer
    return tokenizer


def post(server: LiveServer, path: str, **body: Any) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=LONG_S) as client:
        return client.post(server.url + path, json=body)


def message(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


HOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/predict", {"text": HUGE}),
    "input": ("/predict", {"input": HUGE}),
    "prompt": ("/v1/completions", {"model": "tiny", "prompt": HUGE}),
    "one of several": ("/v1/completions", {"model": "tiny", "prompt": ["a", HUGE]}),
    "message": ("/v1/chat/completions", {"model": "tiny", "messages": message(HUGE)}),
    "part": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": message([{"type": "text", "text": HUGE}])},
    ),
    "small parts": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": message([{"type": "text", "text": "x" * 50}] * 40_000)},
    ),
    "name": (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                *message("a"),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": HUGE, "arguments": ""}}
                    ],
                },
            ],
        },
    ),
    "description": (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": message("a"),
            "tools": [
                {"type": "function", "function": {"name": "f", "description": HUGE}},
            ],
        },
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_cannot_fit_is_refused_before_it_is_tokenized(server: LiveServer, name: str) -> None:
    path, body = HOLDERS[name]
    tokenizer_of(server).lengths.clear()
    response = post(server, path, **body)
    assert response.status_code in {400, 422}, response.text
    error = response.json()["error"]
    assert "has at least" in error["message"]
    assert "200000" in error["message"]
    assert len(response.content) < 500
    assert all(length < 100 for length in tokenizer_of(server).lengths)


@pytest.mark.parametrize("texts", [HUGE, [HUGE], ["a", HUGE]])
def test_what_cannot_fit_is_refused_for_embeddings(embedder: LiveServer, texts: Any) -> None:
    tokenizer_of(embedder).lengths.clear()
    response = post(embedder, "/v1/embeddings", model="tiny", input=texts)
    assert response.status_code == 400
    assert "has at least" in response.json()["error"]["message"]
    assert all(length < 100 for length in tokenizer_of(embedder).lengths)


def begin(server: LiveServer, path: str, **body: Any) -> threading.Thread:
    """Send a request whose answer nobody reads; it is under way, in the tokenizer, on return."""
    num_before = len(tokenizer_of(server).lengths)
    thread = threading.Thread(target=post, args=(server, path), kwargs=body, daemon=True)
    thread.start()
    wait_for(lambda: len(tokenizer_of(server).lengths) > num_before)
    return thread


MAY_FIT = "x" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        {"messages": message(MAY_FIT)},
        {"messages": message([{"type": "text", "text": MAY_FIT}])},
        {"messages": message([{"type": "text", "text": "x" * 50}] * 2000)},
        {"messages": message(MAY_FIT), "response_format": SCHEMA},
        {"messages": message("a"), "tools": [WEATHER], "tool_choice": "required"}
        | {"messages": message(MAY_FIT)},
    ],
)
def test_a_text_that_may_fit_holds_nobody_up(server: LiveServer, body: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(server)
    tokenizer.is_open.clear()
    try:
        # It asks for more than there is room for, so that nothing is computed in the end.
        path = "/v1/chat/completions"
        thread = begin(server, path, model="tiny", max_tokens=150_000, **body)
        short = {"model": "tiny", "messages": message("Hi"), "max_tokens": 16}
        for further in ({}, {"response_format": SCHEMA}, {"tools": [WEATHER]}):
            response = post(server, path, **short, **further)
            assert response.status_code == 200, response.text
        assert thread.is_alive()
    finally:
        tokenizer.is_open.set()
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_a_text_that_may_fit_holds_no_embeddings_up(embedder: LiveServer) -> None:
    tokenizer = tokenizer_of(embedder)
    tokenizer.is_open.clear()
    try:
        thread = begin(embedder, "/v1/embeddings", model="tiny", input=["a", MAY_FIT], dimensions=9)
        assert post(embedder, "/v1/embeddings", model="tiny", input="Hi").status_code == 200
        assert thread.is_alive()
    finally:
        tokenizer.is_open.set()
        embedder.host.end_requests()  # the text would be computed for minutes


def test_grammars_have_a_thread_of_their_own(server: LiveServer) -> None:
    runner: Any = server.host.runner
    may_go_on = threading.Event()
    held = runner._grammars.submit(may_go_on.wait, LONG_S)
    try:
        # Nothing of the long one is computed: it leaves no room for its answer.
        for length, max_tokens, status in ((2, 1, 200), (LONG_PROMPT + 1, CONTEXT_TOKENS, 400)):
            body = {"model": "tiny", "prompt": "a" * length, "max_tokens": max_tokens}
            response = post(server, "/v1/completions", **body)
            assert response.status_code == status, response.text
    finally:
        may_go_on.set()
    assert held.result(LONG_S)


def test_the_prompts_of_one_request_are_tokenized_in_turn_with_others(server: LiveServer) -> None:
    """None of them is long, and all of them together are."""
    tokenizer = tokenizer_of(server)
    tokenizer.lengths.clear()
    runner: Any = server.host.runner
    may_go_on = threading.Event()
    held = runner._tokenizing.submit(may_go_on.wait, LONG_S)
    several = threading.Thread(
        target=post,
        args=(server, "/v1/completions"),
        kwargs={"model": "tiny", "prompt": ["several"] * 32, "max_tokens": 1},
    )
    several.start()
    try:
        wait_for(lambda: runner._tokenizing._work_queue.qsize() > 0)
        other = threading.Thread(
            target=post,
            args=(server, "/v1/completions"),
            kwargs={"model": "tiny", "prompt": "another one", "max_tokens": 1},
        )
        other.start()
        wait_for(lambda: runner._tokenizing._work_queue.qsize() > 1)
    finally:
        may_go_on.set()
    for thread in (several, other):
        thread.join(LONG_S)
    assert held.result()
    assert len(tokenizer.lengths) == 33
    assert tokenizer.lengths.index(len("another one")) <= 2
