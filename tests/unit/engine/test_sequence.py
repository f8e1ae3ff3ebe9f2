"""What a client sees of one generation: each token once, in order, and exactly one end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import InvalidStateError, ThreadPoolExecutor
from typing import Any

import pytest

from mlops.engine.request import GenerationRequest
from mlops.engine.sequence import (
    Generation,
    GenerationEvent,
    Sequence,
    TokenLogprobs,
    wake_readers,
)
from mlops.errors import EngineError, EngineShutdownError

TIMEOUT_S = 30.0
END = 0


class Letters:
    """A text builder for tokens that are characters; stops at "!", holds back "?"."""

    def __init__(self) -> None:
        self.text = ""
        self.has_stopped = False
        self._held = ""

    def add(self, token: int) -> str:
        letter = chr(token)
        self.has_stopped = letter == "!"
        if self.has_stopped or letter == "?":
            self._held = letter
            return ""
        return self._give(self._held + letter)

    def finish(self) -> str:
        return "" if self.has_stopped else self._give(self._held)

    def _give(self, text: str) -> str:
        self._held = ""
        self.text += text
        return text


def begin(max_tokens: int = 100) -> Sequence:
    text: Any = Letters()
    return Sequence(
        GenerationRequest((1, 2, 3), max_tokens=max_tokens),
        Generation(),
        None,
        text,
        frozenset([END]),
    )


def say(sequence: Sequence, text: str) -> None:
    """One step of the engine for each letter; "\\0" is the end token."""
    for letter in text:
        sequence.add(ord(letter))
        sequence.publish()
        wake_readers([sequence.generation])


def end(sequence: Sequence, error: Exception | None = None) -> None:
    if error is not None:
        sequence.fail(error)
    else:
        sequence.finish("cancelled")
    sequence.publish()
    wake_readers([sequence.generation])


async def read(
    generation: Generation, seen: list[GenerationEvent] | None = None
) -> list[GenerationEvent]:
    seen = [] if seen is None else seen
    async for event in generation.events():
        seen.append(event)
    return seen


async def let_others_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def joined(events: list[GenerationEvent]) -> tuple[str, str]:
    """Text and tokens of all events."""
    tokens = "".join(chr(token) for event in events for token in event.tokens)
    return "".join(event.text for event in events), tokens


@pytest.mark.parametrize(
    ("said", "max_tokens", "text", "tokens", "reason"),
    [
        ("abc\0", 9, "abc", "abc", "stop"),
        ("\0", 9, "", "", "stop"),
        ("abc", 3, "abc", "abc", "length"),
        ("ab!", 9, "ab", "ab!", "stop"),
        ("ab!", 3, "ab", "ab!", "stop"),  # the stop text tells more than the length
        ("ab?\0", 9, "ab?", "ab?", "stop"),
        ("ab?", 3, "ab?", "ab?", "length"),
    ],
)
def test_ends(said: str, max_tokens: int, text: str, tokens: str, reason: str) -> None:
    async def stream() -> list[GenerationEvent]:
        streamed = begin(max_tokens)
        reader = asyncio.create_task(read(streamed.generation))
        await let_others_run()
        say(streamed, said)
        return await reader

    alone = begin(max_tokens)
    say(alone, said)
    result = alone.generation.result(0)
    assert (result.text, result.finish_reason) == (text, reason)
    assert result.tokens == tuple(map(ord, tokens))
    assert (result.prompt_tokens, result.completion_tokens) == (3, len(tokens))
    events = asyncio.run(stream())
    assert joined(events) == (text, tokens)
    assert [event.finish_reason for event in events if event.finish_reason] == [reason]
    assert events[-1].result is not None
    assert events[-1].result.text == text


def test_one_event_for_each_step_of_a_reader_who_keeps_up() -> None:
    async def test() -> None:
        sequence = begin()
        seen: list[GenerationEvent] = []
        reader = asyncio.create_task(read(sequence.generation, seen))
        for number, letter in enumerate("abc"):
            await let_others_run()
            assert len(seen) == number
            say(sequence, letter)
        await let_others_run()
        assert [event.text for event in seen] == ["a", "b", "c"]
        end(sequence)
        assert (await reader)[-1].finish_reason == "cancelled"

    asyncio.run(test())


def test_a_slow_reader_gets_one_longer_event() -> None:
    async def test() -> None:
        sequence = begin()
        events = sequence.generation.events()
        first = asyncio.ensure_future(anext(events))
        await let_others_run()
        sequence.add(ord("a"), TokenLogprobs(ord("a"), -1.0))
        sequence.publish()
        for letter in "bcd":
            sequence.add(ord(letter), TokenLogprobs(ord(letter), -2.0))
            sequence.publish()
        wake_readers([sequence.generation])
        merged = await first
        assert (merged.text, merged.tokens) == ("abcd", tuple(b"abcd"))
        assert [one.logprob for one in merged.logprobs] == [-1.0, -2.0, -2.0, -2.0]
        assert merged.finish_reason is None
        say(sequence, "e\0")
        last = await anext(events)
        assert (last.text, last.tokens, last.finish_reason) == ("e", (ord("e"),), "stop")
        assert last.result is not None
        assert last.result.text == "abcde"
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    asyncio.run(test())


@pytest.mark.parametrize("num_before", range(5))
def test_a_late_reader_gets_everything(num_before: int) -> None:
    said = "abc\0"

    async def test() -> list[GenerationEvent]:
        sequence = begin()
        say(sequence, said[:num_before])
        reader = asyncio.create_task(read(sequence.generation))
        await let_others_run()
        say(sequence, said[num_before:])
        return await reader

    events = asyncio.run(test())
    assert joined(events) == ("abc", "abc")
    assert events[-1].finish_reason == "stop"
    assert events[-1].result is not None


def test_a_reader_who_stops_cancels_and_one_who_saw_the_end_does_not() -> None:
    async def test() -> None:
        stopped, finished = begin(), begin()
        say(finished, "ab\0")
        await read(finished.generation)
        assert not finished.generation.is_cancelled
        events = stopped.generation.events()
        waiting = asyncio.ensure_future(anext(events))
        await let_others_run()
        say(stopped, "a")
        assert (await waiting).text == "a"
        assert not stopped.generation.is_cancelled
        await events.aclose()
        assert stopped.generation.is_cancelled

    asyncio.run(test())


def test_a_reader_whose_task_is_cancelled_while_it_waits_cancels() -> None:
    async def test() -> None:
        sequence = begin()
        reader = asyncio.create_task(read(sequence.generation))
        await let_others_run()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert sequence.generation.is_cancelled
        say(sequence, "ab")  # the engine does not know yet
        end(sequence)

    asyncio.run(test())


@pytest.mark.parametrize("when", ["before", "while it waits", "after"])
def test_an_error_comes_after_the_events_before_it(when: str) -> None:
    async def test() -> None:
        sequence = begin()
        seen: list[GenerationEvent] = []
        if when == "after":
            say(sequence, "ab")
            end(sequence, EngineError("no more"))
        reader = asyncio.create_task(read(sequence.generation, seen))
        if when == "while it waits":
            await let_others_run()
        if when != "after":
            say(sequence, "ab")
            await let_others_run()
            end(sequence, EngineError("no more"))
        with pytest.raises(EngineError, match="no more"):
            await reader
        # One who comes after the end is only told the error.
        assert joined(seen) == (("", "") if when == "after" else ("ab", "ab"))
        assert not any(event.finish_reason for event in seen)
        with pytest.raises(EngineError, match="no more"):
            sequence.generation.result(0)

    asyncio.run(test())


def test_tokens_that_came_with_the_error_are_not_lost() -> None:
    async def test() -> None:
        sequence = begin()
        seen: list[GenerationEvent] = []
        reader = asyncio.create_task(read(sequence.generation, seen))
        await let_others_run()
        sequence.add(ord("a"))  # not yet published
        end(sequence, EngineError("no more"))
        with pytest.raises(EngineError):
            await reader
        assert joined(seen) == ("a", "a")

    asyncio.run(test())


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result(TIMEOUT_S) for future in [threads.submit(f) for f in functions]]


def test_several_event_loops_and_threads_with_one_engine() -> None:
    text = "abcdefghij" * 20
    sequences = [begin(10_000) for _ in range(9)]
    ready = threading.Barrier(4)

    def loop_of(own: list[Sequence]) -> list[list[GenerationEvent]]:
        async def read_all() -> list[list[GenerationEvent]]:
            readers = [asyncio.create_task(read(one.generation)) for one in own]
            await let_others_run()
            ready.wait(TIMEOUT_S)
            return await asyncio.gather(*readers)

        return asyncio.run(read_all())

    def engine() -> None:
        ready.wait(TIMEOUT_S)
        for letter in text + "\0":
            for sequence in sequences:
                sequence.add(ord(letter))
                sequence.publish()
            wake_readers([sequence.generation for sequence in sequences])

    *of_loops, _ = in_threads(
        *(lambda own=sequences[first::3]: loop_of(own) for first in range(3)), engine
    )
    for events in (events for of_loop in of_loops for events in of_loop):
        assert joined(events) == (text, text)
        assert events[-1].result is not None


def test_a_loop_is_woken_once_for_all_its_readers() -> None:
    class CountingLoop(asyncio.SelectorEventLoop):
        num_calls = 0

        def call_soon_threadsafe(self, *arguments: Any, **keywords: Any) -> Any:
            self.num_calls += 1
            return super().call_soon_threadsafe(*arguments, **keywords)

    async def test() -> None:
        sequences = [begin() for _ in range(20)]
        readers = [asyncio.create_task(read(one.generation)) for one in sequences]
        await let_others_run()
        before = loop.num_calls
        for sequence in sequences:
            sequence.add(END)
            sequence.publish()
        wake_readers([sequence.generation for sequence in sequences])
        assert loop.num_calls == before + 1
        await asyncio.gather(*readers)

    loop = CountingLoop()
    try:
        loop.run_until_complete(test())
    finally:
        loop.close()


def test_a_loop_that_is_closed_stops_nobody_else() -> None:
    gone, other = begin(), begin()
    loop = asyncio.new_event_loop()
    events = gone.generation.events()
    waiting = loop.create_task(anext(events))
    loop.run_until_complete(let_others_run())
    loop.call_soon(waiting.cancel)
    waiter = gone.generation._waiter  # a reader that is still waiting when its loop closes
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(waiting)
    loop.close()
    gone.generation._waiter = waiter

    async def test() -> list[GenerationEvent]:
        reader = asyncio.create_task(read(other.generation))
        await let_others_run()
        for sequence in (gone, other):
            sequence.add(END)
            sequence.publish()
        wake_readers([gone.generation, other.generation])
        return await reader

    assert asyncio.run(test())[-1].finish_reason == "stop"
    assert gone.generation.result(0).finish_reason == "stop"


def test_a_result_that_is_waited_for_too_long() -> None:
    sequence = begin()
    for timeout_s in (0, 0.001):
        with pytest.raises(TimeoutError):
            sequence.generation.result(timeout_s)
    say(sequence, "a\0")
    assert sequence.generation.result(0).text == "a"  # waiting has ended nothing


def test_results_wake_all_threads_that_wait() -> None:
    sequence = begin()
    waiting = threading.Barrier(4)

    def wait() -> str:
        waiting.wait(TIMEOUT_S)
        return sequence.generation.result(TIMEOUT_S).text

    def finish() -> None:
        waiting.wait(TIMEOUT_S)
        say(sequence, "abc\0")

    assert in_threads(wait, wait, wait, finish)[:3] == ["abc"] * 3


def test_nobody_who_waits_can_cancel_the_future() -> None:
    sequence = begin()
    assert not sequence.generation.future.cancel()
    say(sequence, "\0")
    assert sequence.generation.result(0).finish_reason == "stop"


def test_it_ends_once() -> None:
    sequence = begin()
    say(sequence, "a\0")
    sequence.fail(EngineShutdownError("too late"))
    assert sequence.error is None
    with pytest.raises(InvalidStateError):
        sequence.publish()
    assert sequence.generation.result(0).text == "a"


def test_cancelling_gives_the_text_so_far() -> None:
    sequence = begin()
    sequence.generation.cancel()
    sequence.generation.cancel()
    for letter in "ab?":
        sequence.add(ord(letter))
    end(sequence)
    result = sequence.generation.result(0)
    assert (result.text, result.finish_reason, result.completion_tokens) == ("ab?", "cancelled", 3)
    assert sequence.is_cancelled
