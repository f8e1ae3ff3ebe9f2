"""A handle on a deployment, without Ray: what it was asked, and the pieces that it answers with."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Piece = list[Message] | Exception | asyncio.Event
START: Message = {
    "type": "http.response.start",
    "status": 201,
    "headers": [(b"content-type", b"text/plain"), (b"x-from", b"there")],
}


def body(text: str, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


WHOLE: tuple[Piece, ...] = ([START, body("Hel")], [body("lo", more=False)])


@dataclass
class Call:
    """One request that was sent on, and its answer."""

    options: dict[str, Any]
    scope: dict[str, Any]
    body: bytes
    pieces: AsyncIterator[list[Message]]
    is_cancelled: bool = False

    def __aiter__(self) -> AsyncIterator[list[Message]]:
        return self.pieces

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass
class Handle:
    """Answers each request with the pieces, or with what `answer` makes of it.

    An Event among the pieces is waited for. Scopes cross a process's border, so they are pickled.
    """

    pieces: tuple[Piece, ...] = WHOLE
    answer: Callable[[dict[str, Any], bytes], AsyncIterator[list[Message]]] | None = None
    calls: list[Call] = field(default_factory=list)

    def options(self, **options: Any) -> _Asking:
        return _Asking(self, options)


@dataclass(frozen=True)
class _Asking:
    handle: Handle
    options: dict[str, Any]

    def remote(self, scope: dict[str, Any], content: bytes) -> Call:
        scope = pickle.loads(pickle.dumps(scope))  # noqa: S301
        pieces = (self.handle.answer or self._scripted)(scope, content)
        self.handle.calls.append(Call(self.options, scope, content, pieces))
        return self.handle.calls[-1]

    async def _scripted(self, *_: Any) -> AsyncIterator[list[Message]]:
        for piece in self.handle.pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, asyncio.Event):
                await piece.wait()
            else:
                yield piece
