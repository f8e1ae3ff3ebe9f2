"""The user's home, for a user id that has none as well: containers run as any number."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """The path with `~` resolved; as it stands where there is no such home.

    For what is to be found. To make a file there is for `Path.expanduser`, which raises a
    `RuntimeError` then: else a folder called `~` would appear.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111
