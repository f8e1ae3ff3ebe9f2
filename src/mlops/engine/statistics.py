"""What the engine has done since it started, counted as it goes.

    engine -> `on_...` -> counters -> `snapshot` -> /metrics

Cheap enough to be always on: a few additions per step, some per request.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlops.engine.request import BASE_NAME

MAX_ADAPTERS = 1000
"""Names that are counted by themselves; later ones are counted together."""

OTHER_NAME = "other"

BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds in seconds: those usual with Prometheus, and some on both sides of them."""


class EngineStatistics:
    """Counters of one engine.

    `on_submit` may be called from any thread, the other `on_` methods from one thread, and
    `snapshot` from any: it takes what is there, so two of its numbers may be a step apart.
    """

    def __init__(self) -> None:
        self._adapters_lock = threading.Lock()
        self._num_submitted = 0
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._prefill_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._prefill_steps = 0
        self._steps_by_rows: Counter[int] = Counter()
        self._steps_by_adapters: Counter[int] = Counter()
        self._adapters: dict[str, _AdapterCounters] = {}
        self._queue_s = _Histogram()
        self._first_token_s = _Histogram()
        self._per_token_s = _Histogram()
        self._total_s = _Histogram()

    def on_submit(self, adapter: str | None) -> None:
        """A request was taken in; None is the base model."""
        with self._adapters_lock:
            self._num_submitted += 1
            self._counters_of(adapter).submitted += 1

    def on_step(self, num_rows: int, num_adapters: int) -> None:
        """A decode step of so many rows, of so many different adapters; the base counts as one."""
        self._steps_by_rows[num_rows] += 1
        self._steps_by_adapters[num_adapters] += 1

    def on_prefill(self, num_tokens: int) -> None:
        """A prefill step computed so many tokens of prompts."""
        self._prefill_steps += 1
        self._prefill_tokens += num_tokens

    def on_cached(self, num_tokens: int) -> None:
        """So many tokens of a prompt were not computed: they came from the prefix cache."""
        self._cached_tokens += num_tokens

    def on_finish(
        self,
        adapter: str | None,
        reason: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        queue_s: float | None,
        first_token_s: float | None,
        total_s: float,
    ) -> None:
        """A request has ended.

        Args:
            reason: `stop`, `length`, `cancelled` or `error`.
            queue_s: from its submission to the begin of its prefill; None: it never began.
            first_token_s: from its submission to its first token; None: it has none.
            total_s: from its submission to its end.
        """
        self._finished[reason] += 1
        self._prompt_tokens += prompt_tokens
        self._completion_tokens += completion_tokens
        with self._adapters_lock:
            counters = self._counters_of(adapter)
        counters.finished += 1
        counters.prompt_tokens += prompt_tokens
        counters.completion_tokens += completion_tokens
        if queue_s is not None:
            self._queue_s.add(queue_s)
        if first_token_s is not None:
            self._first_token_s.add(first_token_s)
            if completion_tokens > 1:
                self._per_token_s.add((total_s - first_token_s) / (completion_tokens - 1))
        self._total_s.add(total_s)

    def snapshot(self) -> dict[str, Any]:
        """All counters, in JSON's types.

        Histograms of times are as Prometheus has them: `buckets` counts, by its upper bound in
        seconds, what is at most so long. `prompt` and `completion` tokens are those of requests
        that have ended; `prefill` and `cached` ones are counted as they are computed or found.
        """
        # To copy a dict is one step of the interpreter; to iterate over one written to is not.
        by_rows, by_adapters = dict(self._steps_by_rows), dict(self._steps_by_adapters)
        return {
            "requests": {"submitted": self._num_submitted, "finished": dict(self._finished)},
            "tokens": {
                "prompt": self._prompt_tokens,
                "prefill": self._prefill_tokens,
                "cached": self._cached_tokens,
                "completion": self._completion_tokens,
            },
            "steps": {
                "decode": sum(by_rows.values()),
                "prefill": self._prefill_steps,
                "mixed": sum(steps for number, steps in by_adapters.items() if number > 1),
                "by_rows": _with_text_keys(by_rows),
                "by_adapters": _with_text_keys(by_adapters),
            },
            "adapters": {
                name: counters.snapshot() for name, counters in dict(self._adapters).items()
            },
            "times_s": {
                "queue": self._queue_s.snapshot(),
                "first_token": self._first_token_s.snapshot(),
                "per_output_token": self._per_token_s.snapshot(),
                "total": self._total_s.snapshot(),
            },
        }

    def _counters_of(self, adapter: str | None) -> _AdapterCounters:
        """To be called with the lock held: two threads could both find the last name missing."""
        name = BASE_NAME if adapter is None else adapter
        counters = self._adapters.get(name)
        if counters is None:
            name = name if len(self._adapters) < MAX_ADAPTERS else OTHER_NAME
            counters = self._adapters.setdefault(name, _AdapterCounters())
        return counters


@dataclass
class _AdapterCounters:
    submitted: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def snapshot(self) -> dict[str, int]:
        return dict(vars(self))


class _Histogram:
    """Times by their length."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_S) + 1)  # the last: longer than all bounds
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS_S, seconds)] += 1
        self._sum_s += seconds

    def snapshot(self) -> dict[str, Any]:
        buckets, count = {}, 0
        for bound, num_here in zip([*BUCKETS_S, float("inf")], list(self._counts), strict=True):
            count += num_here
            buckets["+Inf" if bound == float("inf") else f"{bound:g}"] = count
        return {"buckets": buckets, "sum": self._sum_s, "count": count}


def _with_text_keys(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(number): counts[number] for number in sorted(counts)}
