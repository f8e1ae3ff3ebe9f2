"""One request under way: its choices as chunks, as the whole, given up, and failing."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

import tiny_models
from mlops import engine
from mlops.engine import Generation, GenerationEvent, GenerationRequest, GenerationResult
from mlops.errors import EngineError, InvalidRequestError
from mlops.serving.runner import MLXModelRunner
from mlops.serving.runner.answer import Answer, Prepared
from mlops.serving.runner.base import TextChunk

LONG_S = 60.0


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLXModelRunner]:
    folder = tiny_models.write_language_model(tmp_path_factory.mktemp("models") / "tiny")
    made = MLXModelRunner(folder, engine_config=engine.EngineConfig(max_rows=4))
    made.load_model()
    yield made
    made.unload_model()


async def chunks_of(answer: Answer) -> list[TextChunk]:
    return [chunk async for chunk in answer.chunks()]


@pytest.mark.parametrize("n", [1, 3, 7])  # 7 are more than the rows
def test_chunks_are_the_prediction_in_pieces(runner: MLXModelRunner, n: int) -> None:
    fields = {"prompt": "Hello", "max_tokens": 30, "temperature": 1.0, "seed": 1, "n": n}

    async def read() -> tuple[list[TextChunk], dict[str, Any]]:
        answer = runner.generate({**fields, "logprobs": 0})
        return await chunks_of(answer), await answer.prediction()

    chunks, prediction = asyncio.run(read())
    choices = prediction.get(
        "choices", [{"text": prediction["prediction"], "logprobs": prediction["logprobs"]}]
    )
    assert len(choices) == n
    for index, choice in enumerate(choices):
        of_choice = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in of_choice) == choice["text"]
        assert [chunk.finish_reason for chunk in of_choice[:-1]] == [None] * (len(of_choice) - 1)
        assert of_choice[-1].finish_reason in ("length", "stop")
        tokens = [token for chunk in of_choice for token in chunk.tokens]
        assert tokens == [entry["token"] for entry in choice["logprobs"]]
        logprobs = [entry.logprob for chunk in of_choice for entry in chunk.logprobs or ()]
        assert logprobs == [entry["logprob"] for entry in choice["logprobs"]]
    num_tokens = sum(len(chunk.tokens) for chunk in chunks)
    assert prediction["usage"]["completion_tokens"] == num_tokens
    again = runner.predict(fields)
    assert again["prediction"] == prediction["prediction"]
    assert "logprobs" not in again


def test_without_logprobs_a_chunk_has_none(runner: MLXModelRunner) -> None:
    chunks = asyncio.run(chunks_of(runner.generate({"prompt": "Hello", "max_tokens": 3})))
    assert {chunk.logprobs for chunk in chunks} == {None}


@pytest.mark.parametrize("n", [1, 3])
def test_a_reader_who_stops_ends_every_choice(runner: MLXModelRunner, n: int) -> None:
    async def read_one() -> dict[str, Any]:
        answer = runner.generate({"prompt": "Hello", "max_tokens": 900, "n": n})
        chunks = answer.chunks()
        await anext(chunks)
        await chunks.aclose()
        return await asyncio.wait_for(answer.prediction(), LONG_S)

    prediction = asyncio.run(read_one())
    reasons = [one["finish_reason"] for one in prediction.get("choices", [prediction])]
    assert reasons == ["cancelled"] * n


def test_a_task_that_is_cancelled_ends_its_reading(runner: MLXModelRunner) -> None:
    async def read() -> dict[str, Any]:
        answer = runner.generate({"prompt": "Hello", "max_tokens": 900, "n": 2, "ignore_eos": True})
        reading = asyncio.create_task(chunks_of(answer))
        while not runner.statistics()["running"]:
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        return await asyncio.wait_for(answer.prediction(), LONG_S)

    choices = asyncio.run(read())["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["cancelled"] * 2


def test_given_up_before_it_is_prepared(runner: MLXModelRunner) -> None:
    before = runner.statistics()["requests"]["submitted"]
    may_go_on = threading.Event()
    runner._tokenizing.submit(may_go_on.wait, LONG_S)
    answers = [runner.generate({"prompt": "Hello", "max_tokens": 5}) for _ in range(3)]
    answers[0].cancel()
    answers[0].cancel()

    async def read() -> dict[str, Any]:
        for wait in (answers[0].prediction, lambda: chunks_of(answers[0])):
            with pytest.raises(EngineError, match="given up before"):
                await wait()
        waiting = asyncio.create_task(answers[1].prediction())
        await asyncio.sleep(0)
        waiting.cancel()  # the client has left: nothing is told to it
        with pytest.raises(asyncio.CancelledError):
            await waiting
        answers[1].cancel()
        may_go_on.set()
        return await answers[2].prediction()

    try:
        assert asyncio.run(read())["usage"]["completion_tokens"] == 5
    finally:
        may_go_on.set()
    assert runner.statistics()["requests"]["submitted"] == before + 1


def test_given_up_while_it_is_prepared() -> None:
    prepared: Future[Prepared] = Future()
    prepared.set_running_or_notify_cancel()
    answer = Answer(prepared, lambda *_: {})
    answer.cancel()
    generations = [Generation(), Generation()]
    prepared.set_result(Prepared(GenerationRequest((1,)), generations))
    assert all(generation.is_cancelled for generation in generations)
    answer.cancel()


def test_given_up_after_a_refusal_and_after_the_end(runner: MLXModelRunner) -> None:
    refused = runner.generate({"prompt": "x" * 2000})
    with pytest.raises(InvalidRequestError):
        asyncio.run(chunks_of(refused))
    refused.cancel()
    done = runner.generate({"prompt": "Hello", "max_tokens": 2})
    first = asyncio.run(done.prediction())
    done.cancel()
    assert asyncio.run(done.prediction()) == first
    assert first["finish_reason"] == "length"


def test_a_choice_that_fails_ends_the_chunks_and_the_other_choices() -> None:
    generations = [Generation(), Generation()]
    prepared: Future[Prepared] = Future()
    prepared.set_result(Prepared(GenerationRequest((1,)), generations))
    answer = Answer(prepared, lambda *_: {})

    async def read() -> list[str]:
        texts = []
        with pytest.raises(EngineError, match="no memory"):
            async for chunk in answer.chunks():
                texts.append(chunk.text)
                generations[1].future.set_exception(EngineError("no memory"))
                engine_tells(generations[1])
        return texts

    generations[0].put(GenerationEvent("Hel", (1,)))
    assert asyncio.run(asyncio.wait_for(read(), LONG_S)) == ["Hel"]
    assert generations[0].is_cancelled
    with pytest.raises(EngineError, match="no memory"):
        generations[0].future.set_result(GenerationResult("", (), "cancelled", 1, 0, 0, 0, 0))
        asyncio.run(answer.prediction())


def engine_tells(generation: Generation) -> None:
    from mlops.engine.sequence import wake_readers

    wake_readers([generation])


def test_a_slow_reader_holds_nobody_up(runner: MLXModelRunner) -> None:
    """What it did not take comes as one chunk for each choice."""

    async def read() -> list[TextChunk]:
        answer = runner.generate({"prompt": "Hello", "max_tokens": 100, "n": 2})
        chunks = answer.chunks()
        found = [await anext(chunks)]
        await answer.prediction()  # everything is there now
        return found + [chunk async for chunk in chunks]

    found = asyncio.run(read())
    assert sum(len(chunk.tokens) for chunk in found) == 200
    assert len(found) < 20


def test_many_requests_at_once(runner: MLXModelRunner) -> None:
    fields = [{"prompt": "abcd"[n % 4], "max_tokens": 5 + n, "n": 1 + n % 2} for n in range(12)]

    async def texts(one: dict[str, Any]) -> str:
        return "".join([c.text for c in await chunks_of(runner.generate(one)) if c.index == 0])

    async def read() -> Sequence[str]:
        return await asyncio.gather(*map(texts, fields))

    expected = [runner.predict(one)["prediction"] for one in fields]
    assert asyncio.run(read()) == expected


@pytest.mark.parametrize(
    "slow",
    [
        {"prompt": "a " * 100_000},
        {"messages": [{"role": "user", "content": "a" * 50_001}]},
        {"prompt": "a", "response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
    ],
)
def test_what_takes_long_to_prepare_is_in_nobodys_way(
    runner: MLXModelRunner, slow: dict[str, Any]
) -> None:
    may_go_on = threading.Event()
    held = runner._tokenizing_long.submit(may_go_on.wait, LONG_S)

    async def read() -> dict[str, Any]:
        waiting = runner.generate({**slow, "max_tokens": 5})
        quick = await runner.generate({"prompt": "Hello", "max_tokens": 5}).prediction()
        waiting.cancel()
        return quick

    try:
        assert asyncio.run(read())["usage"]["completion_tokens"] == 5
        assert not held.done()
    finally:
        may_go_on.set()


def test_more_choices_than_can_ever_wait_are_refused(runner: MLXModelRunner) -> None:
    config = runner.engine_config
    runner.engine_config = dataclasses.replace(config, max_waiting=3)
    try:
        with pytest.raises(InvalidRequestError, match="n must be from 1 to 3") as refused:
            runner.predict({"text": "Hello", "n": 4})
        assert refused.value.field == "n"
    finally:
        runner.engine_config = config


def test_too_many_logprobs_of_an_answer_is_refused(runner: MLXModelRunner) -> None:
    asked = {"text": "Hello", "n": 16, "max_tokens": 4096, "logprobs": 20}
    with pytest.raises(InvalidRequestError, match="logprobs asks for too many") as refused:
        runner.predict(asked)
    assert refused.value.field == "logprobs"
