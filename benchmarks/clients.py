"""The clients of the `serving` benchmark: each asks, waits for the whole answer, and asks again.

They share the cores with the servers, so they do little: HTTP/1.0, where an answer ends when its
connection does, on both sides with one connection a request, as `mlx_lm.server` wants it. What they
cost is measured. An answer that does not have the tokens that were asked for ends the benchmark.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.models import Prompt, to_text

TIMEOUT_S = 300.0
MAX_RESETS = 1000


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its tokens and, of a streamed one, the time to its first text."""

    text: str
    num_tokens: int
    first_token_s: float | None


@dataclass(frozen=True)
class Round:
    """All answers to one list of prompts.

    Attributes:
        answers: in the order of the prompts.
        tokens_per_s: generated tokens of all answers, over the time from the first request to the
            last answer.
        num_resets: connections that the server dropped; their requests were sent again, and the
            time of the first attempt counts.
        client_share: what the clients used of one core.
    """

    answers: tuple[Answer, ...]
    tokens_per_s: float
    num_resets: int
    client_share: float

    @property
    def first_token_ms(self) -> list[float]:
        """Of each streamed answer."""
        return [1000 * one.first_token_s for one in self.answers if one.first_token_s is not None]


def ask_all(
    port: int,
    prompts: Sequence[Prompt],
    naming: Callable[[int], dict[str, str]],
    *,
    num_clients: int,
    max_tokens: int,
    stream: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> Round:
    """Let `num_clients` clients work through the prompts, each in its turn.

    Args:
        naming: the fields that name the model and the adapter of the prompt with this number.
        stream: ask for a stream, and note when its first text came.
        fields: further ones of every request; then an answer may be shorter than `max_tokens`.
    """
    bodies = [
        {
            **naming(number),
            "prompt": to_text(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
            **(fields or {}),
        }
        for number, prompt in enumerate(prompts)
    ]
    work = _Work(port, bodies, [len(prompt) for prompt in prompts], may_be_short=bool(fields))
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    asyncio.run(work.run(num_clients))
    elapsed_s = time.perf_counter() - start_s
    return Round(
        tuple(work.answers[number] for number in range(len(bodies))),
        sum(answer.num_tokens for answer in work.answers.values()) / elapsed_s,
        work.num_resets,
        (time.process_time() - start_cpu_s) / elapsed_s,
    )


class _Work:
    """Requests that several clients share."""

    def __init__(
        self,
        port: int,
        bodies: Sequence[dict[str, Any]],
        prompt_tokens: Sequence[int],
        *,
        may_be_short: bool,
    ) -> None:
        self._port = port
        self._may_be_short = may_be_short
        self._prompt_tokens = prompt_tokens
        self._requests = iter(list(enumerate(bodies)))
        self.answers: dict[int, Answer] = {}
        self.num_resets = 0

    async def run(self, num_clients: int) -> None:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as clients:
            for _ in range(num_clients):
                clients.create_task(self._ask_in_turn())

    async def _ask_in_turn(self) -> None:
        for number, body in self._requests:
            start_s = time.perf_counter()
            while (answer := await self._try_ask(number, body, start_s)) is None:
                self.num_resets += 1
                if self.num_resets > MAX_RESETS:
                    raise SystemExit(f"port {self._port} drops every connection")
            self.answers[number] = answer

    async def _try_ask(self, number: int, body: dict[str, Any], start_s: float) -> Answer | None:
        """The answer; None when the server dropped the connection before it said anything."""
        payload = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(head.encode() + payload)
            status = await reader.readline()
            if not status:
                return None
            first_s = None
            received = []
            if body["stream"] and b" 200 " in status:
                while line := await reader.readline():
                    received.append(line)
                    if any(_texts([line])):
                        first_s = time.perf_counter() - start_s
                        break
            received.append(await reader.read())
        except ConnectionError:
            return None
        finally:
            if writer is not None:
                writer.close()
        content = b"".join(received)
        if b" 200 " not in status:
            raise SystemExit(f"{status.decode().strip()}: {content.decode()[-500:]}")
        return self._check(number, body, content, first_s)

    def _check(
        self, number: int, body: dict[str, Any], content: bytes, first_s: float | None
    ) -> Answer:
        if body["stream"]:
            lines = content.splitlines()
            text = "".join(_texts(lines))
            usage: dict[str, Any] = next(
                (event["usage"] for event in _events(lines) if event.get("usage")), {}
            )
        else:
            answer = json.loads(content.partition(b"\r\n\r\n")[2])
            text, usage = answer["choices"][0]["text"], answer["usage"]
        expected = (self._prompt_tokens[number], body["max_tokens"])
        found = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        is_short = self._may_be_short and found[0] == expected[0] and found[1] <= expected[1]
        if found != expected and not is_short:
            raise SystemExit(
                f"port {self._port}: {found} tokens of prompt and answer, not {expected}"
            )
        if not text or (body["stream"] and first_s is None):
            raise SystemExit(f"port {self._port}: an answer without text")
        return Answer(text, usage["completion_tokens"], first_s)


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    """The pieces of text in lines of server-sent events."""
    for event in _events(lines):
        if "error" in event:
            raise SystemExit(f"an error in a stream: {event['error']}")
        yield from (choice["text"] for choice in event["choices"])


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        content = line.strip().removeprefix(b"data: ")
        if content != line.strip() and content != b"[DONE]":
            yield json.loads(content)
