"""A process that does what a thread could not be stopped from doing: it can be killed.

    lines of JSON -> a script of this package -> a line for each

What comes from clients and checkpoints may keep a library busy for ever. The script imports nothing
of this package, so it starts quickly, and says with an empty line that it is ready.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from mlops.errors import EngineError

START_S = 30.0
PIECE_BYTES = 1024 * 1024


class HelperProcess:
    """One such process; it is started when it is first needed, and again after it was killed.

    It ends with this object, at the latest with the interpreter. For one thread at a time.

    Args:
        script: the name of a file beside this one.
    """

    def __init__(self, script: str) -> None:
        self._script = Path(__file__).with_name(script)
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[..., Any] | None = None

    def ask(self, line: bytes, timeout_s: float) -> bytes | None:
        """The line that answers a line; None, and the process is killed, when none comes in time.

        Raises:
            EngineError: the process cannot be started.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        try:
            _write(process, line)
            answer = _read_line(process, timeout_s)
        except BrokenPipeError:  # what was asked has ended the process
            answer = None
        if answer is None:
            self.end()
        return answer

    def end(self) -> None:
        """Kill it. Nothing when it does not run."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None

    def _start(self) -> subprocess.Popen[bytes]:
        self.end()
        # -P: or modules beside the script would stand for those of the standard library.
        process = subprocess.Popen(
            [sys.executable, "-P", str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process, self._stop = process, weakref.finalize(self, _kill, process)
        if _read_line(process, START_S) is None:
            self.end()
            raise EngineError(f"the process of {self._script.name} cannot be started")
        return process


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    if process.stdin is not None:
        process.stdin.write(line + b"\n")
        process.stdin.flush()


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """The next line; None when it is not there in time, or never will be."""
    if process.stdout is None:
        return None
    give_up_s = time.monotonic() + timeout_s
    waiting = select.poll()  # unlike select.select, for any number of open files
    waiting.register(process.stdout, select.POLLIN)
    line = bytearray()
    while not line.endswith(b"\n"):
        left_s = give_up_s - time.monotonic()
        if left_s <= 0 or not waiting.poll(1000 * left_s):
            return None
        piece = os.read(process.stdout.fileno(), PIECE_BYTES)
        if not piece:
            return None
        line += piece
    return bytes(line[:-1])


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:  # closes the pipes and waits
        pass
