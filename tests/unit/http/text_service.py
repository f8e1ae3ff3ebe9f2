"""The HTTP app over a runner of the tests, and its events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from echo_runner import EchoRunner
from starlette.testclient import TestClient
from text_runner import LONG_S

from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app

INFO = ServiceInfo("my_service", model="models/my_model", model_tag="my_model:1.0.0")
Serve = Callable[..., TestClient]


def wait_for(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.002)


@contextmanager
def serving_runners() -> Iterator[Serve]:
    """Makes clients of loaded services, which end with the block."""
    hosts: list[RunnerHost] = []

    def serve(
        runner: EchoRunner,
        settings: HTTPSettings | None = None,
        info: ServiceInfo = INFO,
        **limits: Any,
    ) -> TestClient:
        host = RunnerHost(lambda: runner, **limits)
        hosts.append(host)
        host.start()
        wait_for(lambda: host.status != "loading")
        return TestClient(
            create_app(Served(host, info, settings or HTTPSettings())),
            raise_server_exceptions=False,
        )

    try:
        yield serve
    finally:
        for host in hosts:
            host.stop()


def events_of(text: str) -> list[Any]:
    """The events of a stream; each is one line of data and an empty one."""
    lines = text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in data]
