"""prometheus_client's files of values, so that a full disk costs metrics and not the process.

The library maps sparse files into memory, and the system ends a process (SIGBUS) that touches a
page for which the disk has no room. Here every byte of a file is written before it is mapped. A
series that there is no room for stays in this process's memory; once there is room, it is written
with its next change.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FIRST_BYTES = 1 << 16
"""Of a new file; as many as the library maps at first."""

_ENTRY_BYTES = 32
"""At most, of a series in a file, besides its name: lengths, padding, value and time."""

_unwritten: set[tuple[str, str]] = set()  # files and names of series


def num_unwritten() -> int:
    """How many series of this process its disk has no room for."""
    return len(_unwritten)


def withstand_full_disk(folder: Path) -> None:
    """Let no file of this process in `folder`, open already or not, be written where it has holes.

    It changes the library's class: files that a user's own metrics have opened are its instances.
    """
    from prometheus_client import mmap_dict

    library: Any = mmap_dict.MmapedDict
    if hasattr(library, "is_allocated"):
        return
    open_file, add_series = library.__init__, library._init_value
    read, write = library.read_value, library.write_value

    def prepare(self: Any, filename: str) -> None:
        self._fname, self._f, self._m = filename, None, None  # opened for its first series
        self._positions = {}

    def allocate_and_add(self: Any, key: str) -> None:
        if self._m is None:
            _create(Path(self._fname))
            open_file(self, self._fname)
        if key in self._positions:  # of an earlier process with this id
            return
        capacity = self._capacity
        while self._used + len(key.encode()) + _ENTRY_BYTES > capacity:
            capacity *= 2  # as the library will do
        _fill(self._f.fileno(), self._capacity, capacity)
        add_series(self, key)

    def try_read(self: Any, key: str) -> tuple[float, float]:
        try:
            value: tuple[float, float] = read(self, key)
        except OSError as exc:
            _note_unwritten(self._fname, key, exc)
            return 0.0, 0.0
        return value

    def try_write(self: Any, key: str, value: float, timestamp: float) -> None:
        try:
            write(self, key, value, timestamp)
        except OSError as exc:
            _note_unwritten(self._fname, key, exc)
        else:
            if _unwritten:
                _unwritten.discard((self._fname, key))

    for path in folder.glob(f"*_{os.getpid()}.db"):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(content)  # where it had holes it has zeros
    library.__init__, library._init_value = prepare, allocate_and_add
    library.read_value, library.write_value = try_read, try_write
    library.is_allocated = True


def _create(path: Path) -> None:
    """Make a file of zeros; others see it when it is whole."""
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(bytes(FIRST_BYTES))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fill(file: int, size: int, new_size: int) -> None:
    written = size
    try:
        while written < new_size:
            written += os.pwrite(file, bytes(new_size - written), written)
    except OSError:
        os.ftruncate(file, size)
        raise


def _note_unwritten(filename: str, key: str, exc: OSError) -> None:
    if not _unwritten:
        logger.warning(
            "%s cannot hold all metrics (%s): /metrics lacks some until there is room",
            Path(filename).parent,
            exc.strerror,
        )
    _unwritten.add((filename, key))
