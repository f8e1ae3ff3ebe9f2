"""Counters, and reading them while they are written."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mlops.engine.statistics import BUCKETS_S, MAX_ADAPTERS, EngineStatistics


def finish(statistics: EngineStatistics, adapter: str | None = None, **fields: Any) -> None:
    defaults: dict[str, Any] = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "queue_s": 0.01,
        "first_token_s": 0.2,
        "total_s": 1.0,
    }
    reason = fields.pop("reason", "stop")
    statistics.on_finish(adapter, reason, **(defaults | fields))


def test_everything_is_counted_in_its_place() -> None:
    statistics = EngineStatistics()
    for adapter in (None, "a", "a"):
        statistics.on_submit(adapter)
    statistics.on_cached(16)
    statistics.on_prefill(5)
    statistics.on_prefill(20)
    statistics.on_step(3, 2)
    statistics.on_step(3, 1)
    statistics.on_step(12, 3)
    finish(statistics, "a")
    finish(statistics, None, reason="length", prompt_tokens=10, completion_tokens=1)
    snapshot = statistics.snapshot()
    times = snapshot.pop("times_s")
    assert snapshot == {
        "requests": {"submitted": 3, "finished": {"stop": 1, "length": 1}},
        "tokens": {"prompt": 17, "prefill": 25, "cached": 16, "completion": 6},
        "steps": {
            "decode": 3,
            "prefill": 2,
            "mixed": 2,
            "by_rows": {"3": 2, "12": 1},
            "by_adapters": {"1": 1, "2": 1, "3": 1},
        },
        "adapters": {
            "base": {"submitted": 1, "finished": 1, "prompt_tokens": 10, "completion_tokens": 1},
            "a": {"submitted": 2, "finished": 1, "prompt_tokens": 7, "completion_tokens": 5},
        },
    }
    assert (times["queue"]["count"], times["queue"]["sum"]) == (2, pytest.approx(0.02))
    # A single token has no time between tokens.
    assert (times["per_output_token"]["count"], times["per_output_token"]["sum"]) == (1, 0.2)


def test_buckets_are_cumulative_and_hold_their_bound() -> None:
    statistics = EngineStatistics()
    for seconds in (0.0, 0.001, 0.0011, 60.0, 1e9):
        finish(statistics, total_s=seconds, first_token_s=None)
    buckets = statistics.snapshot()["times_s"]["total"]["buckets"]
    assert list(buckets) == [f"{bound:g}" for bound in BUCKETS_S] + ["+Inf"]
    assert (buckets["0.001"], buckets["0.0025"], buckets["30"]) == (2, 3, 3)
    assert (buckets["60"], buckets["+Inf"]) == (4, 5)


def test_a_request_that_never_began_has_only_a_total_time() -> None:
    statistics = EngineStatistics()
    finish(statistics, reason="cancelled", completion_tokens=0, queue_s=None, first_token_s=None)
    times = statistics.snapshot()["times_s"]
    assert {name: times[name]["count"] for name in times} == {
        "queue": 0,
        "first_token": 0,
        "per_output_token": 0,
        "total": 1,
    }


def test_more_adapters_than_are_kept_are_counted_together() -> None:
    statistics = EngineStatistics()
    for number in range(MAX_ADAPTERS + 5):
        statistics.on_submit(f"adapter-{number}")
        finish(statistics, f"adapter-{number}")
    adapters = statistics.snapshot()["adapters"]
    assert len(adapters) == MAX_ADAPTERS + 1
    assert (adapters["other"]["submitted"], adapters["other"]["finished"]) == (5, 5)
    assert adapters["adapter-3"]["completion_tokens"] == 5


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_it_can_be_read_while_several_threads_write() -> None:
    for _ in range(10):
        write_and_read(EngineStatistics(), num_each=MAX_ADAPTERS)


def write_and_read(statistics: EngineStatistics, num_each: int) -> None:
    def submit() -> None:
        for number in range(num_each):
            statistics.on_submit(f"adapter-{number}")

    def run() -> None:
        for number in range(num_each):
            statistics.on_step(number, number)
            finish(statistics, f"adapter-{number}", reason=f"reason-{number}")

    threads = [threading.Thread(target=submit) for _ in range(2)] + [threading.Thread(target=run)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        json.dumps(statistics.snapshot(), allow_nan=False)
    snapshot = statistics.snapshot()
    assert snapshot["requests"]["submitted"] == 2 * num_each
    assert {one["submitted"] for one in snapshot["adapters"].values()} == {2}
    assert {one["finished"] for one in snapshot["adapters"].values()} == {1}
    assert snapshot["steps"]["decode"] == num_each
