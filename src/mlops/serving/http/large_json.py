"""JSON of megabytes, which log-probabilities are, made beside the event loop.

A thread alone would not help: `json` holds Python's lock from the beginning of a text to its end,
for seconds. So long lists are written piece by piece.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.responses import Response

Result = TypeVar("Result")

PIECE = 64
"""Entries of a list that are written at once: with log-probabilities, a few milliseconds."""


def is_large(prediction: Mapping[str, Any]) -> bool:
    """Whether an answer may be megabytes of JSON."""
    return "logprobs" in prediction


async def in_thread(make: Callable[[], Result]) -> Result:
    """What `make` returns, one after the other: the threads of the event loop stay free."""
    return await asyncio.get_running_loop().run_in_executor(_one_at_a_time(), make)


async def large_response(make: Callable[[], Mapping[str, Any]]) -> Response:
    """Answer with the JSON of what `make` returns; both are made in a thread."""
    content = await in_thread(lambda: "".join(pieces(make())).encode("ascii"))
    return Response(content, media_type="application/json")


def pieces(value: Any) -> Iterator[str]:
    """A value as JSON in ASCII, in short pieces; an iterator in it is a list.

    Raises:
        ValueError: there is NaN or infinity in it.
    """
    if isinstance(value, Mapping) and value:
        before = "{"
        for name, inner in value.items():
            yield f"{before}{json.dumps(name)}:"
            yield from pieces(inner)
            before = ","
        yield "}"
    elif isinstance(value, Iterator) or (isinstance(value, list) and len(value) > PIECE):
        entries, before = iter(value), "["
        while some := list(itertools.islice(entries, PIECE)):
            yield before + _dump(some)[1:-1]
            before = ","
        yield "[]" if before == "[" else "]"
    elif isinstance(value, list) and value:
        before = "["
        for inner in value:
            yield before
            yield from pieces(inner)
            before = ","
        yield "]"
    else:
        yield _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


@functools.cache
def _one_at_a_time() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="mlops-json")
