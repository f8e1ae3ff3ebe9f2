"""The questions this toolkit asks the machine, each a small function that a test can replace.

`machine.py` draws its conclusions from a `Probes` alone, so what it says about a Mac is tested on
Linux with recorded answers.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 1 << 20
COMMAND_TIMEOUT_S = 10


def run_command(command: Sequence[str]) -> str | None:
    """What the command prints, stripped, or None when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def read_text(path: str) -> str | None:
    """The file's text, at most 1 MiB of it and stripped, or None when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors="replace").strip()
    except OSError:
        return None


def read_sysctl(name: str) -> str | None:
    """The macOS kernel's answer to `name`, or None when it knows no such name."""
    return run_command(["/usr/sbin/sysctl", "-n", name]) or None


def count_usable_cores() -> int:
    """The logical cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def read_thermal_level() -> int | None:
    """macOS's `NSProcessInfo.thermalState`, 0 (nominal) to 3 (critical); None elsewhere."""
    if platform.system() != "Darwin":
        return None
    try:
        ctypes.CDLL("/System/Library/Frameworks/Foundation.framework/Foundation")
        objc = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
    except OSError:
        return None
    objc.objc_getClass.restype = objc.sel_registerName.restype = ctypes.c_void_p
    objc.objc_getClass.argtypes = objc.sel_registerName.argtypes = [ctypes.c_char_p]
    send = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
        ("objc_msgSend", objc)
    )
    process = send(objc.objc_getClass(b"NSProcessInfo"), objc.sel_registerName(b"processInfo"))
    # An NSInteger comes back in the register a pointer would; ctypes spells 0 as None.
    return send(process, objc.sel_registerName(b"thermalState")) or 0


def find_version(distribution: str) -> str | None:
    """The installed version of a Python distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure_free_disk(path: str) -> int:
    """The bytes that can still be written at `path`, or at its nearest folder that exists."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Probes:
    """Where the facts come from. Every default asks this machine."""

    system: Callable[[], str] = platform.system
    machine: Callable[[], str] = platform.machine
    mac_version: Callable[[], str] = lambda: platform.mac_ver()[0]
    sysctl: Callable[[str], str | None] = read_sysctl
    run: Callable[[Sequence[str]], str | None] = run_command
    read_file: Callable[[str], str | None] = read_text
    list_paths: Callable[[str], list[str]] = lambda pattern: sorted(glob.glob(pattern))  # noqa: PTH207
    usable_cores: Callable[[], int] = count_usable_cores
    thermal_level: Callable[[], int | None] = read_thermal_level
    version: Callable[[str], str | None] = find_version
    free_disk_bytes: Callable[[str], int] = measure_free_disk
