"""Whether an engine, or a batch, moves while it has requests.

A step is the smallest thing that is counted: a chunk of a prompt, a token of each row, a text made
a vector, an adapter loaded, a request that ended, a custom model's batch. So a long prompt is many
steps, and an engine that makes none for a long time hangs inside of one.
"""

from __future__ import annotations

import time
from typing import Any

from mlops.serving.http.batcher import Batcher
from mlops.serving.runner.base import TextRunner

MAX_GAP_S = 5.0
"""Between two looks no more than this counts: a process that was stopped could not move either."""


class Progress:
    """Notices what stands still although it has requests, as long as somebody looks."""

    def __init__(self) -> None:
        self._seen: Any = None
        self._still_s = 0.0
        self._looked_s = time.monotonic()

    def still_s(self, text_runner: TextRunner | None, batcher: Batcher | None) -> float:
        """How long nothing has moved, by this look and those before; 0 with nothing to do."""
        has_work, state = _state_of(text_runner, batcher)
        now = time.monotonic()
        if has_work and state == self._seen:
            self._still_s += min(now - self._looked_s, MAX_GAP_S)
        else:
            self._seen, self._still_s = state, 0.0
        self._looked_s = now
        return self._still_s


def _state_of(text_runner: TextRunner | None, batcher: Batcher | None) -> tuple[bool, Any]:
    """Whether there is something to do, and what changes as it is done."""
    if text_runner is not None:
        engine = text_runner.statistics()
        # Not what was submitted: that goes on while nothing is done.
        moving = [engine.get("steps"), engine.get("tokens")]
        moving.append(engine.get("requests", {}).get("finished"))
        adapters = engine.get("resident_adapters", {})
        moving += [adapters.get(one) for one in ("loads", "failed")]
        if adapters.get(
            "loading"
        ):  # its files are hashed in another thread, for as long as it takes
            moving.append(engine.get("turns"))
        embeddings = dict(engine.get("embeddings") or {})
        embedding = embeddings.pop("running", 0)
        moving.append(embeddings)
        has_work = engine.get("running") or engine.get("waiting") or embedding
        return bool(has_work), repr(moving)
    if batcher is not None:
        return bool(batcher.num_running), sum(batcher.batch_sizes.values())
    return False, None
