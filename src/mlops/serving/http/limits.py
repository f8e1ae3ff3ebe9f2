"""How much each client may ask: requests a minute, and requests at one time."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from mlops.counts import count

MAX_CLIENTS = 10_000
"""Clients that are remembered; a flood of addresses costs no more memory than these."""

_BURST_S = 60.0
_ROUNDING_S = 1e-6


@dataclass(slots=True)
class Client:
    """What one client has used.

    Attributes:
        whole_s: of the clock; when it may send a whole minute's requests at once again.
    """

    whole_s: float = -math.inf
    num_running: int = 0


class Limits:
    """Requests of each client: how many a minute, and how many at one time.

    A client may save up a minute's requests and send them at once; then they come at the even rate.
    (The generic cell rate algorithm: one time for each client, no timer.) Not for several threads.

    Args:
        per_minute, at_once: None is no limit.
        clock: seconds; never goes back.

    Attributes:
        per_minute, at_once: may be changed at any time.
    """

    def __init__(
        self,
        per_minute: int | None,
        at_once: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.per_minute = per_minute
        self.at_once = at_once
        self._clock = clock
        self._clients: OrderedDict[str, Client] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clients)

    def enter(self, name: str) -> Client:
        """Count a request in; its end is told to `leave`.

        Raises:
            HTTPException: 429, one of the limits is reached. Such a request counts for nothing.
        """
        client = self._find(name)
        if self.at_once is not None and client.num_running >= self.at_once:
            raise _too_many(
                f"{count(client.num_running, 'of your requests is', 'of your requests are')} being "
                "answered, which is the limit",
                1,
            )
        if self.per_minute is not None:
            now = self._clock()
            whole_s = max(client.whole_s, now) + 60 / self.per_minute
            wait_s = whole_s - now - _BURST_S
            if wait_s > _ROUNDING_S:
                raise _too_many(
                    f"you may send {count(self.per_minute, 'request')} a minute, which is the "
                    "limit",
                    wait_s,
                )
            client.whole_s = whole_s
        client.num_running += 1
        return client

    def leave(self, client: Client) -> None:
        """Count a request out."""
        client.num_running -= 1

    def _find(self, name: str) -> Client:
        client = self._clients.get(name)
        if client is None:
            self._make_room()
            client = self._clients[name] = Client()
        else:
            self._clients.move_to_end(name)
        return client

    def _make_room(self) -> None:
        """Forget who has been silent for longest. Clients with running requests stay known."""
        for _ in range(2):  # so the number goes down again when those that stayed have ended
            if len(self._clients) >= MAX_CLIENTS:
                name, client = next(iter(self._clients.items()))
                if client.num_running:
                    self._clients.move_to_end(name)
                else:
                    del self._clients[name]


def _too_many(message: str, wait_s: float) -> HTTPException:
    wait = max(1, math.ceil(wait_s))
    return HTTPException(429, f"{message}: try again in {wait} s", {"Retry-After": str(wait)})
