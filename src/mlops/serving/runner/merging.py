"""Several streams of chunks as one, each chunk as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from mlops.serving.runner.base import TextChunk


async def merge(streams: Sequence[AsyncGenerator[TextChunk]]) -> AsyncGenerator[TextChunk]:
    """The chunks of all of them; the first error ends it, and all of them are closed with it."""
    # One chunk of room: what a slow reader does not take is put together by the generations.
    ready: asyncio.Queue[TextChunk | Exception | None] = asyncio.Queue(1)

    async def read(stream: AsyncGenerator[TextChunk]) -> None:
        try:
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    await ready.put(chunk)
            await ready.put(None)
        except Exception as exc:
            await ready.put(exc)

    readers = [asyncio.create_task(read(stream)) for stream in streams]
    try:
        num_open = len(readers)
        while num_open:
            chunk = await ready.get()
            if isinstance(chunk, Exception):
                raise chunk
            if chunk is None:
                num_open -= 1
            else:
                yield chunk
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
