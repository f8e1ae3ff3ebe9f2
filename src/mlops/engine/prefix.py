"""What earlier requests computed, found by tokens: the policy, without the tensors.

    prompt -> `find` -> state of its longest known beginning -> prefill of the rest -> ... -> `add`

Entries of one namespace lie in a tree whose edges are blocks of tokens. To look a prompt up is one
step per block, and blocks are compared, not only their hashes, so no prompt gets another's state.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

BLOCK_TOKENS = 16
MIN_TOKENS = BLOCK_TOKENS
"""A shorter common beginning is computed faster than fetched. The look-up relies on one block."""

_TOKEN_BYTES = array("I").itemsize
_BLOCK_BYTES = BLOCK_TOKENS * _TOKEN_BYTES


@dataclass(frozen=True)
class PrefixMatch:
    """State that can be used.

    Attributes:
        value: what was added; it may be of more tokens, and is shared: copy before changing it.
        num_tokens: tokens of the request that `value`, cut to so many, holds.
    """

    value: Any
    num_tokens: int


@dataclass(eq=False)
class _Entry:
    namespace: Hashable
    data: bytes
    """Its tokens, unsigned and of 32 bits each."""
    value: Any
    num_bytes: int
    can_cut: bool

    def blocks(self) -> Iterator[bytes]:
        """Whole blocks; what is left of the tokens is `tail`."""
        for at in range(0, len(self.data) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
            yield self.data[at : at + _BLOCK_BYTES]

    @property
    def tail(self) -> bytes:
        return self.data[len(self.data) // _BLOCK_BYTES * _BLOCK_BYTES :]


@dataclass(eq=False, slots=True)
class _Node:
    """A beginning of whole blocks that entries have in common."""

    children: dict[bytes, _Node] = field(default_factory=dict)
    """By their block."""
    ends: dict[bytes, _Entry] = field(default_factory=dict)
    """Entries that end before the next whole block, by the tail that they have here."""
    cuttable: _Entry | None = None
    """One of the entries here and below that can be cut: the one added last, unless it is gone."""

    def choose_cuttable(self) -> None:
        here = (entry for entry in self.ends.values() if entry.can_cut)
        below = (child.cuttable for child in self.children.values() if child.cuttable is not None)
        self.cuttable = next(chain(here, below), None)


class PrefixCache:
    """Values of any kind by the tokens they were computed from, within a budget of bytes.

    A namespace is what else the value depends on: the model's digest, the adapter with its
    generation, the tenant. Namespaces share nothing but the budget. Call it from one thread.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Start empty; a budget of 0 keeps nothing and costs nothing."""
        self._budget_bytes = budget_bytes
        self._roots: dict[Hashable, _Node] = {}
        self._entries: OrderedDict[_Entry, None] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._hits = 0
        self._misses = 0
        self._hit_tokens = 0
        self._evictions = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def describe(self) -> dict[str, int]:
        """Counts since the start, and what is kept now."""
        return {
            "hits": self._hits,
            "misses": self._misses,
            "hit_tokens": self._hit_tokens,
            "entries": self.num_entries,
            "bytes": self.num_bytes,
            "evictions": self._evictions,
        }

    def find(self, namespace: Hashable, tokens: Sequence[int]) -> PrefixMatch | None:
        """Find the state for the longest beginning of `tokens`, of at least `MIN_TOKENS`.

        A match may hold all of `tokens`. For a model that needs at least one token to go on from,
        ask for the prompt without its last.
        """
        if self._budget_bytes <= 0:
            return None
        entry, num_tokens = self._find(namespace, _to_data(tokens))
        if entry is None:
            self._misses += 1
            return None
        self._entries.move_to_end(entry)
        self._hits += 1
        self._hit_tokens += num_tokens
        return PrefixMatch(entry.value, num_tokens)

    def add(
        self,
        namespace: Hashable,
        tokens: Sequence[int],
        value: Any,
        *,
        num_bytes: int,
        can_cut: bool,
    ) -> None:
        """Keep a value, unless what is here serves the same requests; the oldest may have to go.

        Args:
            tokens: ids that fit into 32 bits; those that `value` holds, all of them.
            num_bytes: what `value` occupies; when it is above the budget, it is not kept.
            can_cut: it serves every beginning of its tokens, and not only all of them.
        """
        if num_bytes > self._budget_bytes or len(tokens) < MIN_TOKENS or self._budget_bytes <= 0:
            return
        entry = _Entry(namespace, _to_data(tokens), value, num_bytes, can_cut)
        known, num_tokens = self._find(namespace, entry.data)
        if known is not None and num_tokens == len(tokens) and (known.can_cut or not can_cut):
            self._entries.move_to_end(known)
            return
        if can_cut:
            for shorter in list(self._beginnings_of(entry)):
                self._remove(shorter)
        self._insert(entry)
        while self._num_bytes > self._budget_bytes:
            self._remove(next(iter(self._entries)))
            self._evictions += 1

    def forget(self, namespace: Hashable) -> None:
        """Let go of one namespace's values."""
        self.drop(lambda other: other != namespace)

    def drop(self, keep: Callable[[Hashable], bool]) -> None:
        """Let go of the values of all namespaces that `keep` says no to."""
        gone = {namespace for namespace in self._roots if not keep(namespace)}
        for entry in [entry for entry in self._entries if entry.namespace in gone]:
            del self._entries[entry]
            self._num_bytes -= entry.num_bytes
        for namespace in gone:
            del self._roots[namespace]

    def _find(self, namespace: Hashable, data: bytes) -> tuple[_Entry | None, int]:
        """The entry that serves most tokens, and how many; of equals, one that can be cut."""
        best: _Entry | None = None
        best_bytes = 0
        fork, fork_at = None, 0  # the last node that an entry which can be cut goes through
        for node, at in self._path(namespace, data):
            if at >= MIN_TOKENS * _TOKEN_BYTES and node.cuttable is not None:
                fork, fork_at = node, at
            for tail, entry in node.ends.items():
                if at + len(tail) > best_bytes and data.startswith(tail, at):
                    best, best_bytes = entry, at + len(tail)
        if fork is not None:
            entry, num_common = _find_cuttable(fork, data[fork_at : fork_at + _BLOCK_BYTES])
            if fork_at + num_common >= best_bytes:
                best, best_bytes = entry, fork_at + num_common
        return best, best_bytes // _TOKEN_BYTES

    def _path(self, namespace: Hashable, data: bytes) -> Iterator[tuple[_Node, int]]:
        """Nodes for the beginnings of `data`, each with the number of bytes before it."""
        node, at = self._roots.get(namespace), 0
        while node is not None:
            yield node, at
            node, at = node.children.get(data[at : at + _BLOCK_BYTES]), at + _BLOCK_BYTES

    def _beginnings_of(self, entry: _Entry) -> Iterator[_Entry]:
        for node, at in self._path(entry.namespace, entry.data):
            for tail, other in node.ends.items():
                if entry.data.startswith(tail, at):
                    yield other

    def _insert(self, entry: _Entry) -> None:
        node = self._roots.setdefault(entry.namespace, _Node())
        for block in entry.blocks():
            if entry.can_cut:
                node.cuttable = entry
            child = node.children.get(block)
            if child is None:
                child = node.children[block] = _Node()
            node = child
        if entry.can_cut:
            node.cuttable = entry
        node.ends[entry.tail] = entry
        self._entries[entry] = None
        self._num_bytes += entry.num_bytes

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry]
        self._num_bytes -= entry.num_bytes
        node = root = self._roots[entry.namespace]
        path = []
        for block in entry.blocks():
            path.append((node, block))
            node = node.children[block]
        del node.ends[entry.tail]
        if node.cuttable is entry:
            node.choose_cuttable()
        for parent, block in reversed(path):
            child = parent.children[block]
            if not child.children and not child.ends:
                del parent.children[block]
            if parent.cuttable is entry:
                parent.choose_cuttable()
        if not root.children:
            del self._roots[entry.namespace]


def _find_cuttable(node: _Node, rest: bytes) -> tuple[_Entry, int]:
    """The entry at or below `node` that can be cut and goes on most like `rest`.

    Returns:
        The entry, and how many bytes of `rest`, less than a block, are the same.
    """
    here = ((tail, entry) for tail, entry in node.ends.items() if entry.can_cut)
    below = ((block, child.cuttable) for block, child in node.children.items())
    return max(
        (
            (entry, _count_common(tokens, rest))
            for tokens, entry in chain(here, below)
            if entry is not None
        ),
        key=itemgetter(1),
    )


def _count_common(left: bytes, right: bytes) -> int:
    """Bytes that both begin with."""
    length = min(len(left), len(right))
    differing = int.from_bytes(left[:length], "little") ^ int.from_bytes(right[:length], "little")
    if not differing:
        return length
    lowest_bit = (differing & -differing).bit_length() - 1
    return lowest_bit // 8


def _to_data(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()
