"""What ends a request before its time, and what fails: only what it touches, and nothing leaks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from engines import TIMEOUT_S, ask_all, mlx_lm_says, running, tokens_of
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import Engine, Generation, GenerationRequest, LoadedModel
from mlops.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineError,
    EngineShutdownError,
    IntegrityError,
    InvalidRequestError,
    QueueFullError,
)

POISON = 199
"""A token that `Faulty` does not survive."""


class Faulty:
    """A model that fails when it is told to, or when it sees the poison."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.fails_next_step = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, ids: Any, cache: Any) -> Any:
        is_poisoned = any(POISON in row for row in ids.tolist())
        if is_poisoned or (self.fails_next_step and ids.shape[1] == 1):
            self.fails_next_step = False
            raise RuntimeError("no such kernel")
        return self._model(ids, cache=cache)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: tiny_models.write_lora_adapter(tmp_path_factory.mktemp(name), base, seed=number)
        for number, name in enumerate(("a", "b", "c"), 1)
    }


@pytest.fixture
def faulty(loaded: LoadedModel) -> LoadedModel:
    model: Any = Faulty(loaded.model)
    return dataclasses.replace(loaded, model=model)


@pytest.fixture(scope="module")
def right(loaded: LoadedModel) -> Callable[[GenerationRequest], tuple[int, ...]]:
    """What mlx-lm generates."""
    return lambda request: mlx_lm_says(loaded.model, loaded.tokenizer, request)[1]


def ask(text: str = "Hello", **fields: Any) -> GenerationRequest:
    return GenerationRequest(tuple(text.encode()), **{"max_tokens": 12, **fields})


LONG = "a long prompt, " * 10


class Stepped:
    """An engine, used in the owner thread: it does the steps that it is told to."""

    def __init__(self, one: Engine) -> None:
        self.one = one

    def submit(self, request: GenerationRequest) -> Generation:
        return self.one.submit(request)

    def step(self, number: int = 1) -> None:
        for _ in range(number):
            self.one._guarded_step()

    def step_until_drawn(self, number: int) -> None:
        """Until a row of the batch has drawn so many tokens; the host knows one less."""
        while number not in [row.num_drawn for row in self.one._batch.sequences]:
            self.step()


def by_steps(one: Engine, test: Callable[[Stepped], Any]) -> Any:
    """Run a test in the owner thread, so that the engine does only the steps that it asks for."""
    return engine.run_in_owner(test, Stepped(one))


def counts(one: Engine) -> tuple[int, int]:
    found = one.statistics()
    return found["running"], found["waiting"]


class Clock:
    """The engine's view of the time, which a test can advance."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


PHASES = ["waiting", "prefilling", "running"]


def reach(stepped: Stepped, phase: str, **fields: Any) -> Generation:
    """A request in this phase; where it waits, another one has the only row."""
    if phase == "waiting":
        other = stepped.submit(ask(max_tokens=3))
        stepped.step()
        generation = stepped.submit(ask("other", max_tokens=500, **fields))
        stepped.step()
        assert counts(stepped.one) == (1, 1)
        assert not other.future.done()
    elif phase == "prefilling":
        generation = stepped.submit(ask(LONG, max_tokens=500, **fields))
        stepped.step(2)
        assert counts(stepped.one) == (1, 0)
        assert stepped.one.statistics()["steps"]["decode"] == 0
    else:
        generation = stepped.submit(ask(max_tokens=500, **fields))
        stepped.step(5)
        assert counts(stepped.one) == (1, 0)
        assert stepped.one.statistics()["steps"]["decode"] > 2
    return generation


# Ends before the time.


@pytest.mark.parametrize("phase", PHASES)
def test_a_cancelled_request_ends_at_the_next_step(loaded: LoadedModel, phase: str) -> None:
    def test(stepped: Stepped) -> None:
        generation = reach(stepped, phase)
        generation.cancel()
        stepped.step()
        result = generation.result(0)
        assert result.finish_reason == "cancelled"
        assert bool(result.tokens) == (phase == "running")
        assert counts(stepped.one) == ((1, 0) if phase == "waiting" else (0, 0))

    with running(loaded, max_rows=1, prefill_tokens=8) as one:
        by_steps(one, test)
        assert ask_all(one, ask())


@pytest.mark.parametrize("phase", PHASES)
def test_a_deadline_ends_it_in_every_phase(
    loaded: LoadedModel, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("mlops.engine.core.time", clock)

    def test(stepped: Stepped) -> None:
        generation = reach(stepped, phase, deadline_s=time.monotonic() + 1000)
        assert not generation.future.done()
        clock.ahead_s = 1000
        stepped.step()
        with pytest.raises(DeadlineExceededError, match=r"after \d+ of at most 500 tokens"):
            generation.result(0)
        assert counts(stepped.one) == ((1, 0) if phase == "waiting" else (0, 0))

    with running(loaded, max_rows=1, prefill_tokens=8) as one:
        by_steps(one, test)
        assert ask_all(one, ask())


def test_a_full_queue_refuses_and_forgets(loaded: LoadedModel, adapters: dict[str, Path]) -> None:
    def test(stepped: Stepped) -> list[Generation]:
        taken = [stepped.submit(ask(adapter=name)) for name in ("a", None)]
        for name in ("a", "b", None):
            with pytest.raises(QueueFullError, match="2 requests are waiting"):
                stepped.submit(ask(adapter=name))
        assert stepped.one.statistics()["resident_adapters"]["in_use"] == 1
        return taken

    with running(loaded, adapters, max_waiting=2) as one:
        taken = by_steps(one, test)
        assert all(len(one.result(TIMEOUT_S).tokens) == 12 for one in taken)
        assert ask_all(one, ask(adapter="a"))
        with pytest.raises(AdapterNotFoundError):
            one.submit(ask(adapter="nobody"))


def outcomes(generations: list[Generation]) -> list[str]:
    found = []
    for generation in generations:
        error = generation.future.exception(TIMEOUT_S)
        found.append(type(error).__name__ if error else generation.result(0).finish_reason)
    return found


def test_closing_with_time_lets_everybody_finish(
    loaded: LoadedModel, right: Callable[..., Any]
) -> None:
    requests = [ask("x" * number, max_tokens=4 + number) for number in range(1, 13)]
    with running(loaded, max_rows=4) as one:
        generations = [one.submit(request) for request in requests]
        one.close(drain_s=TIMEOUT_S)
        assert [g.result(0).tokens for g in generations] == [right(r) for r in requests]
        with pytest.raises(EngineShutdownError):
            one.submit(ask())


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_closing_without_time_ends_everybody_at_once(loaded: LoadedModel, num_steps: int) -> None:
    def test(stepped: Stepped) -> list[Generation]:
        generations = [stepped.submit(ask(LONG)), stepped.submit(ask(max_tokens=2))]
        generations += [stepped.submit(ask(max_tokens=500)) for _ in range(6)]
        stepped.step(num_steps)
        stepped.one.close()
        assert all(generation.future.done() for generation in generations)
        return generations

    with running(loaded, max_rows=4, prefill_tokens=8) as one:
        found = outcomes(by_steps(one, test))
        assert set(found) <= {"EngineShutdownError", "length"}
        assert found.count("EngineShutdownError") >= 6
        one.close()


def test_closing_while_clients_submit(loaded: LoadedModel) -> None:
    with running(loaded, max_rows=2, max_waiting=10_000) as one, ThreadPoolExecutor(4) as threads:

        def submit_until_closed() -> list[Generation]:
            generations = []
            while True:
                try:
                    generations.append(one.submit(ask(max_tokens=2)))
                except EngineShutdownError:
                    return generations
                generations[-1].future.exception(TIMEOUT_S)

        clients = [threads.submit(submit_until_closed) for _ in range(4)]
        while one.statistics()["requests"]["finished"].get("length", 0) < 8:
            time.sleep(0.001)
        one.close()
        for client in clients:
            assert set(outcomes(client.result(TIMEOUT_S))) <= {"length", "EngineShutdownError"}


# Memory.


def test_what_can_never_fit_is_refused_with_numbers(loaded: LoadedModel) -> None:
    budget = loaded.trial.cache_cost.num_bytes(4096)
    with running(loaded, cache_memory_bytes=budget) as one:
        for max_tokens in (4096, 10**30):
            with pytest.raises(InvalidRequestError, match=r"prompt of 5 tokens.* MiB") as caught:
                one.submit(ask(max_tokens=max_tokens))
            assert caught.value.field == "max_tokens"
        assert ask_all(one, ask())


@pytest.mark.parametrize("name", [None, "a"])
def test_a_large_request_is_not_starved_and_memory_is_kept(
    loaded: LoadedModel, adapters: dict[str, Path], name: str | None
) -> None:
    cost = loaded.trial.cache_cost.num_bytes
    budget = cost(300)

    def test(stepped: Stepped) -> None:
        small = [stepped.submit(ask(max_tokens=20 + number)) for number in range(4)]
        stepped.step()
        large = stepped.submit(ask(max_tokens=290, adapter=name))
        steps = 0
        while not large.future.done():
            small.append(stepped.submit(ask(max_tokens=20)))  # they keep coming
            stepped.step()
            rows = [*stepped.one._batch.sequences, *stepped.one._prefilling]
            assert len(rows) * cost(max((row.max_length for row in rows), default=0)) <= budget
            steps += 1
        assert steps < 25 + 2 + 290 + 2  # those before it, then it
        assert any(not one.future.done() for one in small)
        while not all(one.future.done() for one in small):
            stepped.step()

    with running(loaded, adapters, cache_memory_bytes=budget, max_waiting=1000) as one:
        by_steps(one, test)


# Failures.


def test_a_prompt_that_fails_fails_alone(faulty: LoadedModel, right: Callable[..., Any]) -> None:
    before, after = ask("before", max_tokens=30), ask("after")

    def test(stepped: Stepped) -> tuple[Generation, Generation]:
        stream = stepped.submit(before)
        stepped.step(3)
        poisoned = stepped.submit(GenerationRequest((1, POISON, 2)))
        stepped.step()
        return stream, poisoned

    with running(faulty) as one:
        stream, poisoned = by_steps(one, test)
        with pytest.raises(EngineError, match="RuntimeError: no such kernel"):
            poisoned.result(TIMEOUT_S)
        assert stream.result(TIMEOUT_S).tokens == right(before)
        assert tokens_of(one, after) == [right(after)]


def test_a_step_that_fails_ends_its_rows_and_no_others(
    faulty: LoadedModel, right: Callable[..., Any]
) -> None:
    """One has drawn its last token, which nobody has read when building the next step fails."""
    done, touched, prefilling, waiting = (
        ask("done", max_tokens=3),
        ask("touched", max_tokens=50),
        ask(LONG),
        ask("waiting"),
    )

    def test(stepped: Stepped) -> list[Generation]:
        generations = [stepped.submit(done), stepped.submit(touched)]
        stepped.step_until_drawn(2)
        generations += [stepped.submit(prefilling), stepped.submit(waiting)]
        stepped.step()
        assert not generations[0].future.done()
        model: Any = faulty.model
        model.fails_next_step = True
        stepped.step()
        assert generations[0].future.done()
        assert generations[1].future.done()
        return generations

    with running(faulty, max_rows=2, prefill_tokens=16) as one:
        found = by_steps(one, test)
        assert found[0].result(0).tokens == right(done)
        with pytest.raises(EngineError, match="no such kernel"):
            found[1].result(0)
        assert [g.result(TIMEOUT_S).tokens for g in found[2:]] == [
            right(prefilling),
            right(waiting),
        ]


class Panic(BaseException):
    """As tokenizers raises it: no `Exception`."""


class Unreadable:
    """The tokens of a step that ran out of memory."""

    def tolist(self) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 17179869184 bytes")


def spoil_sampler(stepped: Stepped, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("spoilt")

    patch.setattr("mlops.engine.sampling.BatchSampler.__call__", fail)


def spoil_step(stepped: Stepped, patch: pytest.MonkeyPatch) -> None:
    step = stepped.one._batch.step

    def unreadable() -> Any:
        begun = step()
        return dataclasses.replace(begun, draw=dataclasses.replace(begun.draw, tokens=Unreadable()))

    patch.setattr(stepped.one._batch, "step", unreadable)


def spoil_columns(stepped: Stepped, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise Panic("spoilt")

    patch.setattr("mlops.engine.kv.BatchCaches.prepare_step", fail)


@pytest.mark.parametrize("spoil", [spoil_sampler, spoil_step, spoil_columns])
def test_whatever_fails_in_a_step_the_engine_serves_on(
    loaded: LoadedModel,
    adapters: dict[str, Path],
    right: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., None],
) -> None:
    last, waiting = ask("last", max_tokens=4), ask(LONG)

    def test(stepped: Stepped) -> list[Generation]:
        generations = [stepped.submit(last)]
        generations += [stepped.submit(ask(max_tokens=40, adapter=name)) for name in ("a", None)]
        stepped.step_until_drawn(4)  # the last of the first one
        generations.append(stepped.submit(waiting))
        with monkeypatch.context() as patch:
            spoil(stepped, patch)
            stepped.step(1 if spoil is not spoil_step else 2)
        return generations

    with running(loaded, adapters, max_rows=3, prefill_tokens=32) as one:
        generations = by_steps(one, test)
        assert generations[0].result(TIMEOUT_S).tokens == right(last)
        for touched in generations[1:3]:
            with pytest.raises(EngineError, match="spoilt|Unable to allocate"):
                touched.result(TIMEOUT_S)
        assert generations[3].result(TIMEOUT_S).tokens == right(waiting)
        assert tokens_of(one, last, waiting) == [right(last), right(waiting)]


@pytest.mark.parametrize("method", ["join", "leave", "take"])
@pytest.mark.parametrize("failure", [RuntimeError, Panic])
def test_the_batchs_caches_fail(
    loaded: LoadedModel,
    right: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    failure: type[BaseException],
) -> None:
    if (method, failure) == ("take", Panic):
        pytest.skip("MLX raises nothing of this kind, and the prefix cache calls nothing else")
    last, touched, joins, waits = (
        ask("last", max_tokens=3),
        ask("touched", max_tokens=20),
        ask("joins"),
        ask("waits"),
    )

    def fail(*_: Any) -> Any:
        raise failure("spoilt")

    def test(stepped: Stepped) -> list[Generation]:
        generations = [stepped.submit(last), stepped.submit(touched)]
        stepped.step_until_drawn(3)
        if method == "join":
            generations.append(stepped.submit(joins))
        with monkeypatch.context() as patch:
            patch.setattr(f"mlops.engine.kv.BatchCaches.{method}", fail)
            stepped.step()
        generations.append(stepped.submit(waits))
        return generations

    with running(loaded, prefix_memory_bytes=2**20) as one:
        first, second, *others, after = by_steps(one, test)
        assert first.result(TIMEOUT_S).tokens == right(last)  # it needed nothing of this
        if method == "take":  # only the prefix cache needs it
            assert second.result(TIMEOUT_S).tokens == right(touched)
            others = []
        else:
            others.append(second)
        for generation in others:
            with pytest.raises(EngineError, match="spoilt"):
                generation.result(TIMEOUT_S)
        assert after.result(TIMEOUT_S).tokens == right(waits)


@pytest.mark.parametrize("failure", [ValueError, Panic])
@pytest.mark.parametrize("method", ["add", "finish"])
def test_a_row_whose_text_fails_fails_alone(
    loaded: LoadedModel, right: Callable[..., Any], failure: type[BaseException], method: str
) -> None:
    requests = [ask("one"), ask("two"), ask("three")]

    def fail(*_: Any) -> Any:
        raise failure("half a surrogate")

    def test(stepped: Stepped) -> list[Generation]:
        generations = [stepped.submit(request) for request in requests]
        stepped.step(3)
        text: Any = stepped.one._batch.sequences[1].text
        setattr(text, method, fail)
        return generations

    with running(loaded) as one:
        generations = by_steps(one, test)
        with pytest.raises(EngineError, match="cannot be turned into text: half a surrogate"):
            generations[1].result(TIMEOUT_S)
        for number in (0, 2):
            assert generations[number].result(TIMEOUT_S).tokens == right(requests[number])


def test_cancelling_a_row_whose_text_fails(loaded: LoadedModel, right: Callable[..., Any]) -> None:
    def fail() -> Any:
        raise Panic("half a surrogate")

    def test(stepped: Stepped) -> list[Generation]:
        generations = [stepped.submit(ask("one")), stepped.submit(ask("two"))]
        stepped.step(3)
        text: Any = stepped.one._batch.sequences[0].text
        text.finish = fail
        generations[0].cancel()
        return generations

    with running(loaded) as one:
        failed, other = by_steps(one, test)
        with pytest.raises(EngineError, match="half a surrogate"):
            failed.result(TIMEOUT_S)
        assert other.result(TIMEOUT_S).tokens == right(ask("two"))


@pytest.mark.parametrize("method", ["find", "add"])
def test_a_failing_prefix_cache_fails_nobody(
    loaded: LoadedModel, right: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("spoilt")

    requests = [ask(LONG, max_tokens=9), ask(LONG + "!", max_tokens=3), ask("short")]
    with running(loaded, prefix_memory_bytes=2**20) as one:
        with monkeypatch.context() as patch:
            patch.setattr(f"mlops.engine.prefix.PrefixCache.{method}", fail)
            assert tokens_of(one, *requests) == [right(request) for request in requests]
        for _ in range(2):
            assert tokens_of(one, requests[0]) == [right(requests[0])]
        assert one.statistics()["prefix_cache"]["hits"] > 0


# Adapters.


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_only(
    loaded: LoadedModel,
    adapters: dict[str, Path],
    right: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = loaded.banks.load

    def fail_b(name: str, checkpoint: Any) -> int:
        if name == "b":
            raise RuntimeError("no memory")
        return load(name, checkpoint)

    with running(loaded, adapters) as one:
        with monkeypatch.context() as patch:
            patch.setattr(loaded.banks, "load", fail_b)
            names = [None, "b", "a", "b", None]
            generations = [one.submit(ask(adapter=name)) for name in names]
            found = outcomes(generations)
            assert found == ["length", "EngineError", "length", "EngineError", "length"]
            with pytest.raises(EngineError, match="'b' could not be loaded: no memory"):
                generations[1].result(0)
            assert generations[0].result(0).tokens == right(ask())
        assert outcomes([one.submit(ask(adapter="b"))]) == ["length"]  # the next one tries again


def test_a_damaged_adapter_is_found_before_it_is_loaded(
    loaded: LoadedModel, adapters: dict[str, Path]
) -> None:
    problems: list[Exception] = [IntegrityError("its bytes differ")]

    def verify() -> None:
        if problems:
            raise problems.pop()

    with running(loaded) as one:
        one.add_adapter("a", recognise(adapters["a"]), verify=verify)
        damaged, base_request = one.submit(ask(adapter="a")), one.submit(ask())
        with pytest.raises(IntegrityError, match="its bytes differ"):
            damaged.result(TIMEOUT_S)
        assert outcomes([base_request, one.submit(ask(adapter="a"))]) == ["length", "length"]


def test_while_an_adapter_is_verified_others_are_served_and_it_can_be_given_up(
    loaded: LoadedModel, adapters: dict[str, Path]
) -> None:
    gate = threading.Event()
    with running(loaded) as one:
        one.add_adapter("a", recognise(adapters["a"]), verify=lambda: gate.wait() and None)
        waiting = [one.submit(ask(adapter="a")) for _ in range(40)]
        assert outcomes([one.submit(ask())]) == ["length"]
        late = one.submit(ask(adapter="a", deadline_s=time.monotonic()))
        waiting[0].cancel()
        assert outcomes([waiting[0], late]) == ["cancelled", "DeadlineExceededError"]
        # However many wait, one timer looks after them.
        assert sum(isinstance(one, threading.Timer) for one in threading.enumerate()) <= 2
        gate.set()
        assert outcomes(waiting[1:]) == ["length"] * 39


def test_the_owner_waits_for_an_adapter_that_is_verified(
    loaded: LoadedModel, adapters: dict[str, Path]
) -> None:
    with running(loaded) as one:
        one.add_adapter("a", recognise(adapters["a"]), verify=lambda: None)
        result = engine.run_in_owner(lambda: one.wait(one.submit(ask(adapter="a"))))
        assert result.finish_reason == "length"


def test_more_adapters_than_slots_are_loaded_once_each_in_order(
    loaded: LoadedModel, adapters: dict[str, Path]
) -> None:
    with running(loaded, adapters, max_resident_adapters=1) as one:
        ended: list[str] = []

        def test(stepped: Stepped) -> list[Generation]:
            generations = []
            for name in ("a", "b", "c"):
                generations.append(stepped.submit(ask(adapter=name, max_tokens=3)))
                generations[-1].future.add_done_callback(lambda _, name=name: ended.append(name))
            return generations

        assert outcomes(by_steps(one, test)) == ["length"] * 3
        assert ended == ["a", "b", "c"]
        assert one.statistics()["resident_adapters"]["loads"] == 3


def test_busy_adapters_make_room_for_one_that_waits(
    loaded: LoadedModel, adapters: dict[str, Path]
) -> None:
    """Two adapters with ever new requests have the slots, and the third one gets its turn."""

    def test(stepped: Stepped) -> None:
        busy = [stepped.submit(ask(adapter=name, max_tokens=8)) for name in "ab" for _ in range(3)]
        stepped.step(3)
        third = stepped.submit(ask(adapter="c", max_tokens=2))
        for number in range(60):
            busy.append(stepped.submit(ask(adapter="ab"[number % 2], max_tokens=8)))
            stepped.step()
            if third.future.done():
                break
        assert third.future.done()
        while not all(one.future.done() for one in busy):
            stepped.step()

    with running(loaded, adapters, max_rows=4, max_resident_adapters=2) as one:
        by_steps(one, test)


# Threads and processes.


def test_requests_from_eight_threads_at_once(
    loaded: LoadedModel, adapters: dict[str, Path]
) -> None:
    requests = [
        ask(f"number {number}", adapter=[None, "a", "b", "c"][number % 4], max_tokens=4 + number)
        for number in range(24)
    ]
    with running(loaded, adapters, max_rows=6) as one, ThreadPoolExecutor(8) as threads:
        expected = [tokens_of(one, request)[0] for request in requests]
        found = list(threads.map(lambda request: tokens_of(one, request)[0], requests))
    assert found == expected


def test_two_engines_take_turns(loaded: LoadedModel, base: Path) -> None:
    with running(loaded) as one, running(engine.load_model(base)) as other:
        requests = [ask(text, max_tokens=40) for text in ("x", "y")]
        generations = [which.submit(r) for r in requests for which in (one, other)]
        found = [generation.result(TIMEOUT_S).tokens for generation in generations]
        assert found[0::2] == found[1::2] == tokens_of(one, *requests)
        # The owner does only the steps of the one that it waits for.
        both = engine.run_in_owner(lambda: [e.wait(e.submit(requests[0])) for e in (one, other)])
        assert [result.tokens for result in both] == [found[0]] * 2


@pytest.mark.parametrize("waits", ["nobody", "a daemon"])
def test_the_interpreter_exits_while_it_generates(base: Path, waits: str) -> None:
    program = f"""
import atexit, threading, time
generations = []
def late():  # registered before the owner's own end, so it runs after it
    print(type(generations[0].future.exception(5)).__name__)
atexit.register(late)
from mlops import engine
one = engine.Engine(engine.load_model({str(base)!r}))
generations += [one.submit(engine.GenerationRequest((1, 2), max_tokens=1000000, ignore_eos=True))]
while not one.statistics()["steps"]["decode"]:
    time.sleep(0.001)
if {waits != "nobody"}:
    threading.Thread(target=generations[0].future.exception, daemon=True).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "EngineShutdownError\n", "")


# Statistics.


def test_statistics_add_up(loaded: LoadedModel, adapters: dict[str, Path]) -> None:
    requests = [
        ask("x" * (2 + number), adapter=[None, "a"][number % 2], max_tokens=5)
        for number in range(8)
    ]

    def test(stepped: Stepped) -> list[Generation]:
        generations = [stepped.submit(request) for request in requests]
        generations[3].cancel()
        return generations

    with running(loaded, adapters, prefix_memory_bytes=0) as one:
        results = [g.result(TIMEOUT_S) for g in by_steps(one, test)]
        found = one.statistics()
    assert found["requests"] == {"submitted": 8, "finished": {"length": 7, "cancelled": 1}}
    assert found["tokens"]["prompt"] == sum(len(request.prompt) for request in requests)
    assert found["tokens"]["completion"] == sum(len(result.tokens) for result in results) == 35
    computed = [r for r, g in zip(requests, results, strict=True) if g.finish_reason == "length"]
    assert found["tokens"]["prefill"] == sum(len(request.prompt) - 1 for request in computed)
    by_rows = {int(rows): number for rows, number in found["steps"]["by_rows"].items()}
    assert sum(rows * number for rows, number in by_rows.items()) == 35
    assert found["batch_sizes"] == found["steps"]["by_rows"]
    assert found["steps"]["decode"] == sum(found["steps"]["by_adapters"].values())
    assert found["adapters"]["a"]["completion_tokens"] == 15
    assert found["adapters"]["base"]["completion_tokens"] == 20
    times = {name: histogram["count"] for name, histogram in found["times_s"].items()}
    assert times == {"queue": 7, "first_token": 7, "per_output_token": 7, "total": 8}
    assert one.statistics()["cache"]["bytes"] == 0
