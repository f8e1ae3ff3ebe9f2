"""Request bodies: JSON objects of bounded size, read from clients that are not trusted."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read and parse the body of a request.

    Raises:
        HTTPException: 415 not JSON, 413 larger than `max_bytes`, 400 malformed JSON or UTF-8.
        ClientDisconnect: the client left.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "send JSON: the Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "send the body without a Content-Encoding")
    return parse_json_object(await _read(request, max_bytes))


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:  # counted while reading: Content-Length may lie or be absent
            raise HTTPException(413, f"the body is over {max_bytes} bytes", {"Connection": "close"})
    return bytes(body)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse strictly: UTF-8, finite numbers, no lone surrogates, an object at the top.

    Raises:
        HTTPException: 400 with what is wrong.
    """
    try:
        parsed = json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite
        )
        if b"\\u" in body:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeError as exc:
        raise HTTPException(400, "the body is not valid UTF-8 text") from exc
    except RecursionError as exc:
        raise HTTPException(400, "the body is nested too deeply") from exc
    except ValueError as exc:
        raise HTTPException(400, f"the body is not valid JSON: {exc}") from exc
    if not isinstance(parsed, dict):
        raise HTTPException(400, 'the body must be a JSON object, such as {"text": "…"}')
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value
