"""Request bodies: JSON objects of bounded size, read from clients that are not trusted.

Measured, for 4 MiB: one long text takes 10 ms, a list of a million numbers 60 ms. Names cost most,
0.3 s for half a million of them, and the parser does not let go of Python's lock. So a body that
may have many is parsed in a thread by Python's own code: slower, but the event loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import json.scanner
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

READ_TIMEOUT_S = 60.0
"""For a whole body to arrive: a client that crawls gives its place back."""

LARGE_BYTES = 64 * 1024
"""A smaller body is parsed in a few milliseconds, whatever it holds."""

BYTES_PER_PART = 8
"""A list or object costs as much time as a long text: a body may have one for each 8 bytes of its
limit. No arrays of numbers come near that."""

MAX_NAMES = 20_000
"""A body that may have more is parsed in a thread: these take some milliseconds."""

MAX_DEPTH = 200
"""The parser's own."""

_DIGITS_AS_0 = bytes.maketrans(b"123456789E", b"000000000e")
_OVER_RANGE = (b"0e000", b"0e+000", b"0" * 209)
"""With digits as 0: a number of 1e308 and over holds one of these, for 208 digits and e99 do not
reach that far."""


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read and parse the body of a request.

    Raises:
        HTTPException: 415 not JSON, 413 larger than `max_bytes`, 408 too slow, 400 malformed JSON
            or UTF-8, or too many lists and objects.
        ClientDisconnect: the client left.
    """
    headers = request.headers
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "send JSON: the Content-Type must be application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "send the body without a Content-Encoding")
    if _declares_more(headers.get("content-length", ""), max_bytes):
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            body = await _read(request, max_bytes)
    except TimeoutError as exc:
        raise HTTPException(
            408, f"the body did not arrive within {READ_TIMEOUT_S:g} s", {"Connection": "close"}
        ) from exc
    max_parts = max_bytes // BYTES_PER_PART
    if body.count(b"[") + body.count(b"{") > max_parts:  # those in texts counted too
        raise HTTPException(400, f"the body has more than {max_parts} lists and objects")
    # Each name has a colon; those in texts are counted too.
    if body.count(b":") > MAX_NAMES or (len(body) > LARGE_BYTES and _may_overflow(body)):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_one_at_a_time(), parse_slowly, body)
    return parse_json_object(body)


def _declares_more(content_length: str, max_bytes: int) -> bool:
    if not (content_length.isascii() and content_length.isdigit()):
        return False  # absent; the server refuses what is no number
    return len(content_length) > 20 or int(content_length) > max_bytes


async def _read(request: Request, max_bytes: int) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:  # counted while reading too: a chunked body declares nothing
            raise _too_large(max_bytes)
    return body


def _too_large(max_bytes: int) -> HTTPException:
    # The rest of the body will not be read, so no other request can follow it.
    return HTTPException(413, f"the body is over {max_bytes} bytes", {"Connection": "close"})


def parse_json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Parse strictly: UTF-8, finite numbers, no lone surrogates, an object at the top.

    Nesting is limited to 200 levels and integers to 4300 digits. Of a name that comes twice in one
    object the last counts, as in every JSON library that a client may use.

    Raises:
        HTTPException: 400 with what is wrong.
    """
    try:
        with _without_collector(body):
            parsed = from_json(body, allow_inf_nan=False, cache_strings="keys")
        if _may_overflow(body):
            json.loads(body, parse_float=_finite)
    except ValueError as exc:
        raise HTTPException(400, f"the body is not valid JSON: {exc}") from exc
    return _checked(parsed)


def parse_slowly(body: bytes | bytearray) -> dict[str, Any]:
    """The same as `parse_json_object`, in steps between which other threads run.

    Raises:
        HTTPException: 400 with what is wrong.
    """
    decoder: Any = json.JSONDecoder(
        parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_to_object
    )
    # Not the one that is written in C.
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    try:
        parsed = decoder.decode(body.decode())
        _check_depth_and_texts(parsed)
    except RecursionError as exc:
        raise HTTPException(400, "the body is not valid JSON: nested too deeply") from exc
    except ValueError as exc:
        raise HTTPException(400, f"the body is not valid JSON: {exc}") from exc
    return _checked(parsed)


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = {}
    for name, value in pairs:  # one by one: dict() would do it without a break
        made[name] = value
    return made


def _check_depth_and_texts(parsed: Any) -> None:
    level = [parsed]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, str):
                one.encode()  # a lone surrogate is a ValueError
            elif isinstance(one, dict):
                inner += one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return
        level = inner
    raise ValueError("nested too deeply")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


@functools.cache
def _one_at_a_time() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="mlops-bodies")


def _checked(parsed: Any) -> dict[str, Any]:
    if not isinstance(parsed, dict):
        raise HTTPException(400, 'the body must be a JSON object, such as {"text": "…"}')
    return parsed


@contextlib.contextmanager
def _without_collector(body: bytes | bytearray) -> Iterator[None]:
    """Python's collector would look at a million new lists again and again, for seconds."""
    if len(body) <= LARGE_BYTES or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _may_overflow(body: bytes | bytearray) -> bool:
    """Whether a number may be too large for a float, which the parser makes infinite."""
    shape = body.translate(_DIGITS_AS_0)
    return any(part in shape for part in _OVER_RANGE)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value
