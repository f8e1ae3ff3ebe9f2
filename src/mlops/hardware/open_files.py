"""How many files this process may have open; a connection is one too.

mlx-lm sets the limits to 2048 and 4096 when it is imported. That would lower those of a server, for
good where it is not root's, and fails where the hard limit is lower than 4096.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections.abc import Iterator
from typing import Any

MAX_OPEN_FILES = 65_536
"""More than a server needs; some programs walk through all that they may have."""

MAX_OPEN_FILES_UNLIMITED = 10_240
"""Where the hard limit is infinite, as on macOS, which takes no more than this for certain."""


def raise_open_file_limit() -> int:
    """Raise the soft limit to the hard one, within reason; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_OPEN_FILES
    most = MAX_OPEN_FILES_UNLIMITED if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


_lock = threading.RLock()


@contextlib.contextmanager
def open_file_limit_kept() -> Iterator[None]:
    """Let nothing that this thread imports in the block change the limit of open files.

    To put it back afterwards would be too late: only root may raise a hard limit again.
    """
    importing = threading.get_ident()
    with _lock:
        original = resource.setrlimit

        def setrlimit(which: int, limits: Any) -> None:
            if which != resource.RLIMIT_NOFILE or threading.get_ident() != importing:
                original(which, limits)

        resource.setrlimit = setrlimit
        try:
            yield
        finally:
            resource.setrlimit = original
