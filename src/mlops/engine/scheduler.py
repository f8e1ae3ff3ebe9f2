"""Who goes next: waiting requests, fair admission, and shares of the prefill budget.

Policy only: it imports no MLX and knows no arrays.

Fair: the next free row goes to the adapter (or the base) that has the fewest rows, and among those
to the one whose turn is longest ago. So of K adapters that ask, one without rows waits for at most
K - 1 admissions of others, however many requests they have queued and however few rows there are.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Iterable

from mlops.counts import count
from mlops.engine.sequence import Sequence
from mlops.errors import QueueFullError


class Admission(enum.Enum):
    """What the engine says about a request that is next."""

    YES = enum.auto()
    NOT_YET = enum.auto()  # for instance its adapter is being loaded; others may go first
    STOP = enum.auto()  # no memory for it; others must not go first, or it would wait for ever


class Scheduler:
    """The queue of one engine. Not thread-safe: the engine holds its lock or is alone.

    Args:
        max_waiting: requests that may wait before more are refused.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._queues: dict[str | None, deque[Sequence]] = {}
        self._turns: dict[str | None, int] = {}  # counts admissions, while anybody waits
        self._num_admitted = 0

    @property
    def waiting(self) -> list[Sequence]:
        """All that wait, by adapter."""
        return [sequence for queue in self._queues.values() for sequence in queue]

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._queues.values()))

    def num_waiting_by_adapter(self) -> dict[str, int]:
        """How many requests wait for each adapter. From any thread, without the engine's lock."""
        queues = dict(self._queues)  # to copy a dict is one step of the interpreter
        return {name: len(queue) for name, queue in queues.items() if name is not None}

    def add(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
        """
        if self.num_waiting >= self._max_waiting:
            raise QueueFullError(
                f"{count(self.num_waiting, 'request is', 'requests are')} waiting, which is the "
                "limit; try later"
            )
        self._queues.setdefault(sequence.adapter_name, deque()).append(sequence)

    def remove(self, is_unwanted: Callable[[Sequence], bool]) -> list[Sequence]:
        """Take out of the queue whatever need not be computed any more."""
        removed: list[Sequence] = []
        for name, queue in list(self._queues.items()):
            kept: deque[Sequence] = deque()
            for sequence in queue:
                (removed if is_unwanted(sequence) else kept).append(sequence)
            self._replace(name, kept)
        return removed

    def heads(self, active: Iterable[Sequence]) -> list[Sequence]:
        """The oldest request of each adapter, those first that would be admitted first."""
        if not self._queues:
            return []
        num_rows = Counter(sequence.adapter_name for sequence in active)
        names = sorted(self._queues, key=lambda name: self._order(name, num_rows))
        return [self._queues[name][0] for name in names]

    def admit(
        self,
        active: Iterable[Sequence],
        max_rows: int,
        can_admit: Callable[[Sequence], Admission],
    ) -> list[Sequence]:
        """Take the requests that get a row now.

        Args:
            active: those that have rows.
            max_rows: rows that there may be.
            can_admit: asked for each one before it is taken.
        """
        if not self._queues:
            return []
        num_rows = Counter(sequence.adapter_name for sequence in active)
        num_active = num_rows.total()
        admitted: list[Sequence] = []
        skipped: set[str | None] = set()
        while num_active + len(admitted) < max_rows:
            candidates = [name for name in self._queues if name not in skipped]
            if not candidates:
                break
            name = min(candidates, key=lambda name: self._order(name, num_rows))
            sequence = self._queues[name][0]
            answer = can_admit(sequence)
            if answer is Admission.STOP:
                break
            if answer is Admission.NOT_YET:
                skipped.add(name)
                continue
            self._num_admitted += 1
            self._turns[name] = self._num_admitted
            self._queues[name].popleft()
            self._replace(name, self._queues[name])
            admitted.append(sequence)
            num_rows[name] += 1
        return admitted

    def _order(self, name: str | None, num_rows: Counter[str | None]) -> tuple[int, int, float]:
        """The adapter with the lowest is next."""
        return num_rows[name], self._turns.get(name, 0), self._queues[name][0].submitted_s

    def _replace(self, name: str | None, queue: deque[Sequence]) -> None:
        if queue:
            self._queues[name] = queue
        else:
            del self._queues[name]
        if not self._queues:  # nobody waits, so nobody's turn matters
            self._turns.clear()


def share_prefill(prefilling: Iterable[Sequence], budget_tokens: int) -> list[tuple[Sequence, int]]:
    """Which prompts go on in this step, and by how many tokens.

    The oldest is served first, but gets only half of the budget while others wait: a long prompt
    neither stops nor is stopped by short ones. Rows of one forward pass are padded to the longest,
    and the padding counts.

    Returns:
        (sequence, tokens), each at least 1.
    """
    pending = [sequence for sequence in prefilling if sequence.num_to_prefill > 0]
    shares: list[tuple[Sequence, int]] = []
    longest = 0
    for sequence in pending:
        num_rows = len(shares) + 1
        limit = budget_tokens // max(num_rows, min(2, len(pending)))
        tokens = min(sequence.num_to_prefill, max(1, limit))
        longest = max(longest, tokens)
        if shares and num_rows * longest > budget_tokens:
            break
        shares.append((sequence, tokens))
    return shares
