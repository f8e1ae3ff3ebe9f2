"""Who may read what is stored: nobody who could not read where it came from.

There are three answers, each the mode of a file that is only read: its owner, its group too, or
everyone. The umask of the process narrows them as it does for any new file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

OWNER = 0o400
GROUP = 0o440
EVERYONE = 0o444


def readers_of(status: os.stat_result) -> int:
    """Who may read a file, or what lies in a folder."""
    mode = status.st_mode << 2 if stat.S_ISDIR(status.st_mode) else status.st_mode  # x in r's place
    if mode & EVERYONE == EVERYONE:
        return EVERYONE
    return GROUP if mode & GROUP == GROUP else OWNER


def readers_of_copies(sources: Iterable[Path], made: os.stat_result) -> int:
    """Who may read copies of files: who could read each file and the folder that it lies in.

    Args:
        made: status of a new folder where the copies will be: shows the umask, and the group that
            they will have. Readers of another group are no readers of the copies.
    """
    sources = list(sources)
    readers = readers_of(made)
    for path in {*sources, *(source.parent for source in sources)}:
        try:
            status = path.stat()
        except OSError:
            return OWNER  # who copies it will say why it cannot be read
        found = readers_of(status)
        readers &= OWNER if found == GROUP and status.st_gid != made.st_gid else found
    return readers


def restrict(path: Path, readers: int) -> None:
    """Take the permissions of all but `readers` from a file or folder, and all that is in it."""
    group = 0o070 if readers & 0o040 else 0
    others = 0o007 if readers & 0o004 else 0
    for part in (path, *path.rglob("*")):
        mode = stat.S_IMODE(part.lstat().st_mode)
        if not part.is_symlink() and mode & ~(0o7700 | group | others):
            part.chmod(mode & (0o7700 | group | others))


def open_private(path: str, flags: int) -> int:
    """An `opener` for `open`: what it creates only the owner may read, until `chmod`."""
    return os.open(path, flags, 0o600)
