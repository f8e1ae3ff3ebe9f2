"""The owner thread: one, in order, and still there after a failure."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny_models
from mlops.engine import in_owner, owner, run_in_owner, submit_to_owner
from mlops.errors import EngineError, EngineShutdownError


def test_all_callers_share_one_thread() -> None:
    with ThreadPoolExecutor(8) as callers:
        threads = set(callers.map(lambda _: run_in_owner(threading.current_thread), range(64)))
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert not in_owner()


def test_called_from_the_owner_it_is_a_plain_call() -> None:
    assert run_in_owner(lambda: (in_owner(), run_in_owner(in_owner))) == (True, True)


def test_calls_run_in_order() -> None:
    seen: list[int] = []
    futures = [submit_to_owner(seen.append, number) for number in range(200)]
    for future in futures:
        future.result()
    assert seen == list(range(200))


def test_a_failure_reaches_the_caller_and_not_the_thread() -> None:
    before = run_in_owner(threading.current_thread)
    with pytest.raises(ZeroDivisionError):
        run_in_owner(lambda: 1 / 0)
    with pytest.raises(EngineError, match="SystemExit: 3"):  # the caller's thread must go on
        run_in_owner(sys.exit, 3)
    assert run_in_owner(threading.current_thread) is before


def test_what_a_failed_call_held_is_let_go() -> None:
    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    def fail() -> None:
        local = Held()
        held.append(weakref.ref(local))
        raise RuntimeError("no")

    error = submit_to_owner(fail).exception()
    assert isinstance(error, RuntimeError)
    assert held[0]() is None, "the exception's traceback keeps what the owner thread must destroy"


def test_a_cancelled_call_does_not_run() -> None:
    gate, seen = threading.Event(), []
    first = submit_to_owner(gate.wait)
    second = submit_to_owner(seen.append, 1)
    assert second.cancel()
    gate.set()
    first.result()
    run_in_owner(int)
    assert not seen


def test_a_thread_that_died_answers_nobody_and_keeps_nobody_waiting() -> None:
    program = """
import sys, threading, time
from mlops.engine import owner_failure, submit_to_owner
from mlops.errors import EngineShutdownError
assert submit_to_owner(int).result() == 0 and owner_failure() is None
dying = submit_to_owner(time.sleep, 0.2)
before = submit_to_owner(int)
dying.add_done_callback(lambda _: sys.exit("planted"))
for future in (before, submit_to_owner(int)):
    try:
        future.result(30)
    except EngineShutdownError as exc:
        print(exc)
assert "SystemExit: planted" in owner_failure()
try:
    submit_to_owner(int).result(30)
except EngineShutdownError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, [owner.DEAD] * 3), done.stderr


@pytest.mark.parametrize(
    "last_words",
    [
        "run_in_owner(int)",
        "submit_to_owner(print, 'done').result()",
        "gate = threading.Event(); submit_to_owner(work_until_stopped, gate); gate.wait()",
        "atexit.register(late)",
    ],
)
def test_the_interpreter_exits_cleanly(last_words: str) -> None:
    program = f"""
import atexit, threading
from mlops.engine.owner import is_stopping, run_in_owner, submit_to_owner
from mlops.errors import EngineShutdownError
def work_until_stopped(gate):
    gate.set()
    while not is_stopping():
        pass
def late():  # registered before the owner's own end, so it runs after it
    try:
        run_in_owner(int)
    except EngineShutdownError:
        pass
{last_words}
run_in_owner(int) if "gate" not in globals() else None
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_work_that_does_not_end_is_given_up_at_exit() -> None:
    program = """
import threading
from mlops.engine import owner
owner.EXIT_TIMEOUT_S = 0.2
begun = threading.Event()
def work():
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    while True:
        mx.eval(mx.sort(mx.random.normal((20, 200)), axis=-1))
        begun.set()
owner.submit_to_owner(work)
begun.wait()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "done\n")
    assert done.stderr == "the work under way did not end within 0.2 s; it is given up\n"


def test_loading_ends_at_its_next_step_when_the_interpreter_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.write_language_model(tmp_path / "model")
    run_in_owner(int)
    monkeypatch.setattr(owner._current, "is_stopping", True)

    def load() -> None:
        from mlops.engine.loading import _load

        _load(model, False, False, None, None)

    with pytest.raises(EngineShutdownError):
        load()
