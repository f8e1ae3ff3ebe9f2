"""Clients that leave, and steps that fail: real connections, a real engine.

How long a row is held after its client has left is counted in the engine's steps.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gated_service import request
from live_server import LONG_S, LiveServer, read_until, wait_for
from mlops.engine import Engine, EngineConfig, LoadedModel
from mlops.serving.http import RunnerHost
from mlops.serving.runner import MLXModelRunner
from mlops.serving.runner.answer import Prepared
from tiny_models import write_language_model, write_lora_adapter

LONG_PROMPT = list(range(3, 103)) * 6
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
"""With the prompt, all of the model's context."""
MESSAGES = [{"role": "user", "content": "count"}]


class Faulty:
    """A model that fails at a step when it is told to."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.fails_next_step = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, ids: Any, cache: Any) -> Any:
        if self.fails_next_step:
            self.fails_next_step = False
            raise RuntimeError("no such kernel")
        return self._model(ids, cache=cache)


class Runner(MLXModelRunner):
    """Notes when a client gives up, and when the engine lets the request go."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.adapter_may_load = threading.Event()
        self.adapter_is_loading = threading.Event()
        self.waits_for_adapters = False
        self.given_up_at: list[int] = []
        self.gone_at: list[int] = []

    def num_steps(self) -> int:
        steps = self.statistics()["steps"]
        total: int = steps["decode"] + steps["prefill"]
        return total

    def _start_engine(self, loaded: LoadedModel) -> Engine:
        self.faulty = Faulty(loaded.model)
        return super()._start_engine(replace(loaded, model=cast("Any", self.faulty)))

    def _submit(self, *arguments: Any, **options: Any) -> Prepared:
        prepared = super()._submit(*arguments, **options)
        for generation in prepared.generations:
            cancel = generation.cancel

            def cancel_and_note(cancel: Any = cancel, future: Future[Any] = generation.future):
                is_under_way = not future.done()
                cancel()
                # Not before: this thread may have to wait for its turn while steps go by.
                if is_under_way:
                    self.given_up_at.append(self.num_steps())

            generation.cancel = cancel_and_note  # type: ignore[method-assign]
            generation.future.add_done_callback(
                lambda _: self.gone_at.append(self.num_steps())  # in the owner thread
            )
        return prepared

    def _find_adapters(self, resolved: Any) -> Any:
        found = super()._find_adapters(resolved)
        original = type(next(iter(found.values())))
        runner = self

        class Slow(original):  # type: ignore[valid-type, misc]
            def verify(self) -> None:
                super().verify()
                if runner.waits_for_adapters:
                    runner.adapter_is_loading.set()
                    assert runner.adapter_may_load.wait(LONG_S)

        return {name: Slow(**vars(one)) for name, one in found.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder: Path = tmp_path_factory.mktemp("models")
    base = write_language_model(folder / "base", layers=8)  # a second or so for an answer
    adapters: dict[str, str | Path] = {
        name: write_lora_adapter(folder / name, base, base_reference=str(base)) for name in "ab"
    }
    config = EngineConfig(
        max_rows=4, prefill_tokens=8, max_resident_adapters=1, prefix_memory_bytes=0
    )
    runner = Runner(base, adapters=adapters, engine_config=config)
    with LiveServer(RunnerHost(lambda: runner)) as server:
        yield server


@pytest.fixture
def runner(server: LiveServer) -> Iterator[Runner]:
    runner = server.host.runner
    assert isinstance(runner, Runner)
    yield runner
    runner.adapter_may_load.set()
    wait_for(lambda: num_rows(runner) == 0 and runner.statistics()["waiting"] == 0)
    runner.given_up_at.clear()
    runner.gone_at.clear()


def num_rows(runner: Runner) -> int:
    number: int = runner.statistics()["running"]
    return number


def ask(**fields: Any) -> bytes:
    return request("/predict", model=None, **{**LONG, **fields})


def abort(one: socket.socket) -> None:
    """Close with a reset, as a process that dies with unread data does."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def check_freed(runner: Runner, num_choices: int = 1) -> None:
    wait_for(lambda: len(runner.gone_at) == num_choices)
    wait_for(lambda: len(runner.given_up_at) >= num_choices)
    assert max(runner.gone_at) - max(runner.given_up_at[:num_choices]) <= 2
    assert num_rows(runner) == 0


@pytest.mark.parametrize("leave", [abort, socket.socket.close])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_while_it_is_answered(
    server: LiveServer, runner: Runner, stream: bool, n: int, leave: Any
) -> None:
    with server.connection(ask(stream=stream, n=n)) as one:
        if stream:
            read_until(one, b"data: ")
        wait_for(lambda: num_rows(runner) == n)
        leave(one)
    check_freed(runner, n)


def test_half_closed_is_left(server: LiveServer, runner: Runner) -> None:
    """Nobody can tell a client that only has no more to say from one that is gone."""
    with server.connection(ask()) as one:
        wait_for(lambda: num_rows(runner) == 1)
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
    check_freed(runner)


@pytest.mark.parametrize("stream", [True, False])
def test_while_its_prompt_is_computed(server: LiveServer, runner: Runner, stream: bool) -> None:
    before = runner.statistics()["steps"]["prefill"]
    with server.connection(ask(stream=stream, prompt=LONG_PROMPT)) as one:
        wait_for(lambda: runner.statistics()["steps"]["prefill"] > before)
        assert num_rows(runner) == 1
        one.close()
    check_freed(runner)
    computed = runner.statistics()["steps"]["prefill"] - before
    assert computed < len(LONG_PROMPT) / 8 / 2


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_waits_for_a_row(server: LiveServer, runner: Runner, stream: bool) -> None:
    with server.connection(ask(n=4, stream=True)) as busy:
        read_until(busy, b"data: ")
        with server.connection(ask(stream=stream)) as one:
            wait_for(lambda: runner.statistics()["waiting"] == 1)
            one.close()
        wait_for(lambda: runner.gone_at and runner.given_up_at)
        assert runner.gone_at[0] - runner.given_up_at[0] <= 2
        assert num_rows(runner) == 4  # the others go on
        assert read_until(busy, b"data: ")


@pytest.mark.parametrize("stream", [True, False])
def test_while_its_adapter_is_loaded(server: LiveServer, runner: Runner, stream: bool) -> None:
    with server.connection(ask(adapter="a", max_tokens=1)) as one:
        assert b'"adapter":"a"' in read_until(one, b'"adapter":"a"')  # now it is the only resident
    wait_for(lambda: len(runner.gone_at) == 1)
    runner.gone_at.clear()
    runner.adapter_may_load.clear()
    runner.adapter_is_loading.clear()
    runner.waits_for_adapters = True
    with server.connection(ask(adapter="b", stream=stream)) as one:
        assert runner.adapter_is_loading.wait(LONG_S)
        assert runner.statistics()["waiting"] == 1
        one.close()
    # With the adapter still being loaded:
    wait_for(lambda: runner.gone_at and runner.given_up_at)
    assert runner.gone_at[0] - runner.given_up_at[0] <= 2
    assert runner.statistics()["waiting"] == 0
    runner.waits_for_adapters = False
    runner.adapter_may_load.set()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/predict", {"model": None}),
        ("/v1/completions", {"model": "tiny"}),
        ("/v1/chat/completions", {"model": "tiny", "prompt": None, "messages": MESSAGES}),
    ],
)
def test_a_step_that_fails_ends_the_stream_with_an_error(
    server: LiveServer, runner: Runner, path: str, fields: dict[str, Any]
) -> None:
    asked = request(path, max_tokens=900, stream=True, **fields)
    with server.connection(asked) as one:
        so_far = read_until(one, b"data: ")
        wait_for(lambda: num_rows(runner) == 1)
        runner.faulty.fails_next_step = True
        answer = so_far + read_until(one, b"\r\n0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n0\r\n\r\n")  # a whole answer, as HTTP has it
        assert b"[DONE]" not in answer
        last = json.loads(answer.rpartition(b"data: ")[2].partition(b"\n\n")[0])
        assert list(last) == ["error"]
        assert "kernel" not in answer.decode()
        # The next one is fine, on the same connection.
        one.sendall(request(path, max_tokens=2, stream=True, **fields))
        assert b"data: [DONE]" in read_until(one, b"\r\n0\r\n\r\n")
