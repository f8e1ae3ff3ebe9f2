"""Clients that ask all the time, and deployments that end with their test."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from mlops.serving.ray import deploy, undeploy
from ray_cluster import wait_until


class Load:
    """Clients that ask until they are stopped.

    Attributes:
        statuses: of all answers; 0 where the connection broke.
        answers: what the service said.
    """

    def __init__(self, url: str, body: Mapping[str, Any], num_clients: int = 4) -> None:
        self.url, self.body = url, body
        self.statuses = Counter[int]()
        self.answers: list[tuple[float, httpx.Response]] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def _ask(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._stopped.is_set():
                try:
                    response = client.post(self.url, json=self.body)
                except httpx.TransportError:
                    with self._lock:
                        self.statuses[0] += 1
                    time.sleep(0.05)
                    continue
                with self._lock:
                    self.statuses[response.status_code] += 1
                    self.answers.append((time.monotonic(), response))

    def seen(self, since_s: float = 0.0) -> set[str]:
        """Versions that have answered since then."""
        with self._lock:
            answers = [one for at_s, one in self.answers if at_s >= since_s]
        return {one.json()["prediction"][0] for one in answers if one.is_success}

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.statuses)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def deployed(tag: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """A deployment that is gone afterwards; gives its URL."""
    there = deploy(tag, settings)
    try:
        yield there.url
    finally:
        undeploy(there.application)
