"""`bentoml serve --reload`: the workers start again when what the service consists of has changed.

    `Sources` -> its files, looked at every LOOK_S -> a change, and then none for LOOK_S
        -> the service is imported in another process -> its error is told, and nothing else happens
                                                      -> or the workers are restarted

BentoML's own watches everything in the folder, so each line of a log restarts the workers. This one
compares times and sizes of files that it knows: that works on every file system, and what a worker
writes besides is no change. It runs in a thread of the command's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from mlops.counts import count
from mlops.serving.bentoml.shutdown import running_arbiter
from mlops.serving.bentoml.sources import Sources, short
from mlops.serving.bentoml.supervision import RELOAD_VARIABLE

LOOK_S = 0.5

_CONFLICT_S = 0.05

Snapshot = Mapping[Path, tuple[int, ...] | None]
"""Time, size and identity of each file; None for one that is not there."""


@contextlib.contextmanager
def reloading(
    target: str, working_dir: str | None, sources: Sources, ending: threading.Event
) -> Iterator[None]:
    """While the server runs in this block, its workers follow what is edited.

    Args:
        sources: what the service consists of now.
        ending: set when the server was asked to end.
    """
    reloader = _Reloader(target, working_dir, sources, ending)
    thread = threading.Thread(target=reloader.run, name="mlops-reload", daemon=True)
    models = " and the model" if sources.models else ""
    click.echo(
        f"Watching {count(len(sources.code), 'file')} of code{models} for changes.", err=True
    )
    os.environ[RELOAD_VARIABLE] = "1"  # for the workers
    thread.start()
    try:
        yield
    finally:
        reloader.is_over.set()
        thread.join()
        del os.environ[RELOAD_VARIABLE]


class _Reloader:
    """Looks, tries and restarts; see the module."""

    def __init__(
        self, target: str, working_dir: str | None, sources: Sources, ending: threading.Event
    ) -> None:
        self.is_over = threading.Event()
        self._command = [sys.executable, "-m", "mlops.serving.bentoml.sources"]
        self._command += [target, working_dir or ""]
        self._name = sources.name
        self._sources = sources
        self._ending = ending
        self._seen = _look_at(sources)

    def run(self) -> None:
        """Until `is_over`."""
        while not self.is_over.wait(LOOK_S):
            try:
                now = _look_at(self._sources)
                if now != self._seen:
                    self._after_change(now)
            except OSError as exc:  # a folder that is replaced just now
                click.echo(f"what has changed cannot be looked at: {exc}", err=True)

    def _after_change(self, now: Snapshot) -> None:
        while not self.is_over.wait(LOOK_S) and (later := _look_at(self._sources)) != now:
            now = later  # somebody is writing still
        what = _describe_change(self._seen, now)
        if (found := self._import_elsewhere()) is None:
            return
        self._follow(found, now)
        if found.error:
            click.echo(
                f"{what}; the service goes on as it was until that is mended: {found.error}",
                err=True,
            )
        elif not self._ending.is_set() and _look_at(found) == self._seen:  # else once more
            click.echo(f"{what}: starting the workers again.", err=True)
            self._restart()

    def _follow(self, found: Sources, now: Snapshot) -> None:
        """Watch what the service consists of from now on."""
        if found.error:  # what was imported before may be what mends it
            code = tuple({*self._sources.code, *found.code})
            found = Sources(None, code, self._sources.models)
        self._sources = found
        # What has changed since the import began is the next change.
        self._seen = {file: now.get(file, state) for file, state in _look_at(found).items()}

    def _import_elsewhere(self) -> Sources | None:
        """What another process finds that imports the service; None when the server ends."""
        with subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            while True:
                try:
                    answer, _ = process.communicate(timeout=LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    if self.is_over.is_set() or self._ending.is_set():
                        process.kill()
        if self.is_over.is_set() or self._ending.is_set():
            return None
        if not answer:  # circus may have taken the status
            return Sources(None, (), error="the import ended before it was done")
        sources = Sources.from_json(answer)
        if not sources.error and sources.name != self._name:
            reason = f"it was called {self._name!r} and is {sources.name!r} now: serve it anew"
            return Sources(None, sources.code, sources.models, reason)
        return sources

    def _restart(self) -> None:
        """Stop all workers and start them; returns when that is done, or the server ends."""
        arbiter = running_arbiter()
        if arbiter is None:  # it has not begun, and will read what is there now
            return
        is_done = threading.Event()
        arbiter.loop.add_callback(_restart_workers, arbiter, is_done)
        while not is_done.wait(LOOK_S):
            if self.is_over.is_set():
                return


async def _restart_workers(arbiter: Any, is_done: threading.Event) -> None:
    from circus.exc import ConflictError

    while True:
        try:
            restarted = arbiter.restart()
        except ConflictError:  # it looks after its workers just now
            await asyncio.sleep(_CONFLICT_S)
        else:
            break
    try:
        await restarted
    finally:
        is_done.set()


def _describe_change(before: Snapshot, now: Snapshot) -> str:
    changed = sorted(file for file in {*before, *now} if before.get(file) != now.get(file))
    if not changed:
        return "something has changed"
    more = f" and {len(changed) - 1} more have" if len(changed) > 1 else " has"
    return f"{short(changed[0])}{more} changed"


def _look_at(sources: Sources) -> Snapshot:
    return {file: _state_of(file) for file in sources.files()}


def _state_of(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
