"""Links between a run and a package, and the file in which those wait that MLflow did not take.

One JSON object per line, shared by all projects and processes of a BentoML home. Lines are added
and removed under a file lock; a second lock lets one process at a time send.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlops.errors import TrackingError
from mlops.hardware.home import expand

MAX_QUEUE_BYTES = 16 * 1024 * 1024
MAX_FACT_CHARS = 1000
FACTS = ("model_tag", "bento_tag", "model_digest", "project_name")
"""What a link says about a package: the keys of a packaging result that are kept."""
PART_FIELDS = ("tag", "digest", "files_digest", "run_id")
"""What a link says about each part of a package; only tag and digest are always there."""

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ROLE = re.compile(r"model|base_model|adapter\.[a-z0-9][-._a-z0-9]*")


@dataclass(frozen=True)
class PackageLink:
    """One package to be tied to one run.

    Attributes:
        tracking_uri: the MLflow store, without credentials.
        project_name: the experiment for the run when `run_id` is None.
        run_id: the run, or None for the one that has the same link, or a new one.
        facts: some of `FACTS`, with their values.
        parts: the stored models that it consists of: `model`, `base_model`, `adapter.NAME`; some
            of `PART_FIELDS` each.
    """

    tracking_uri: str
    project_name: str
    run_id: str | None
    facts: dict[str, str]
    parts: dict[str, dict[str, str]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.run_id, self.link_id))

    @property
    def package_tag(self) -> str:
        """The model's tag, else the Bento's."""
        return self.facts.get("model_tag") or self.facts["bento_tag"]

    @property
    def title(self) -> str:
        """The Bento's tag, else the model's."""
        return self.facts.get("bento_tag") or self.facts["model_tag"]

    @property
    def link_id(self) -> str:
        """The same for the same content, so a run gets the same link once."""
        content = [self.project_name, self.facts, self.parts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class LinkResult:
    """What became of a link.

    Attributes:
        linked: MLflow has it.
        queued: it waits in the queue.
        reason: why it is not linked, in one sentence; "" when it is.
        run_id: the run it belongs to, when there is one.
        model_id: the external logged model in MLflow, when linked.
    """

    linked: bool
    queued: bool = False
    reason: str = ""
    run_id: str | None = None
    model_id: str | None = None


@dataclass(frozen=True)
class FlushResult:
    """What a flush of the queue did.

    Attributes:
        sent: number of links that MLflow took.
        remaining: number of links that still wait, those of other MLflow stores included.
        rejected: why MLflow will never take some of them; they moved to the `.rejected` file.
        reason: why links remain that were tried; "" when none failed.
    """

    sent: int
    remaining: int
    rejected: list[str] = field(default_factory=list)
    reason: str = ""


def read_facts(result: Mapping[str, Any]) -> dict[str, str]:
    """The `FACTS` in a packaging result; those that are None are left out.

    Raises:
        TrackingError: it is no packaging result.
    """
    if not isinstance(result, Mapping):
        raise TrackingError(f"link_package takes a packaging result, not {type(result).__name__}")
    facts = _texts(result, FACTS, "")
    if not facts.get("model_tag") and not facts.get("bento_tag"):
        raise TrackingError("a packaging result needs a model_tag or a bento_tag to be linked")
    return facts


def read_parts(result: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What `PackageLink.parts` keeps of a packaging result's `parts`, which may be missing.

    Raises:
        TrackingError: they are none that a packaging result has.
    """
    parts = result.get("parts") or {}
    if not isinstance(parts, Mapping) or not all(isinstance(p, Mapping) for p in parts.values()):
        raise TrackingError("parts of a packaging result must be a dict of dicts")
    read = {str(role): _texts(part, PART_FIELDS, f"{role}.") for role, part in parts.items()}
    for role, part in read.items():
        digests = [part[key] for key in ("digest", "files_digest") if key in part]
        if not _ROLE.fullmatch(role) or "tag" not in part or "digest" not in part:
            raise TrackingError(
                f"the part {role[:80]!r} of a packaging result needs tag and digest"
            )
        if not all(map(_DIGEST.fullmatch, digests)):
            raise TrackingError(f"a digest of the part {role!r} of a packaging result is none")
    return read


def _texts(values: Mapping[str, Any], keys: Iterable[str], prefix: str) -> dict[str, str]:
    """Those of the keys that have a value.

    Raises:
        TrackingError: a value is no short text.
    """
    texts = {key: values[key] for key in keys if values.get(key) is not None}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_FACT_CHARS:
            raise TrackingError(
                f"{prefix}{key} of a packaging result must be printable text of at most "
                f"{MAX_FACT_CHARS} characters, not {str(value)[:80]!r}"
            )
    return texts


def private_folder() -> Path:
    """Where what belongs to a model store but is no model is kept: `mlops` in BentoML's home."""
    home = os.environ.get("BENTOML_HOME") or "~/bentoml"
    return expand(os.path.expandvars(home)) / "mlops"


class LinkQueue:
    """The file of waiting links.

    Args:
        path: by default `mlops/tracking-queue.jsonl` in `BENTOML_HOME` or `~/bentoml`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or private_folder() / "tracking-queue.jsonl"
        self.rejected_path = self.path.with_suffix(".rejected.jsonl")

    def add(self, link: PackageLink) -> None:
        """Append a link, unless the same one waits already.

        Raises:
            OSError: the file cannot be written or is full.
        """
        with self._locked():
            lines = self._read_lines()
            line = _to_line(link)
            if line in lines:
                return
            if sum(map(len, lines)) + len(line) > MAX_QUEUE_BYTES:
                raise OSError(f"the queue {self.path} is full")
            # A line cut short by a crash must not swallow this one.
            lead = b"" if not lines or lines[-1].endswith(b"\n") else b"\n"
            _append(self.path, lead + line)

    def waiting(self) -> list[PackageLink]:
        """All links, in the order of their arrival; damaged lines move to the `.rejected` file.

        Raises:
            OSError: the file cannot be read or written.
        """
        with self._locked():
            lines = self._read_lines()
            links = [_from_line(line) for line in lines]
            damaged = [line for line, link in zip(lines, links, strict=True) if link is None]
            if damaged:
                logger.warning("%d damaged lines left %s", len(damaged), self.path)
                self._reject(damaged)
                self._rewrite([line for line in lines if line not in damaged])
            return [link for link in links if link is not None]

    def remove(self, links: list[PackageLink]) -> None:
        """Take links out.

        Raises:
            OSError: the file cannot be written.
        """
        gone = {_to_line(link) for link in links}
        if gone:
            with self._locked():
                self._rewrite([line for line in self._read_lines() if line not in gone])

    def reject(self, links: list[PackageLink]) -> None:
        """Take links out, and keep them in the `.rejected` file for a person to look at.

        Raises:
            OSError: a file cannot be written.
        """
        if links:
            self._reject([_to_line(link) for link in links])
            self.remove(links)

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """Yields True to the one process that may send now, False to all others."""
        with self._lock_file("send").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock_file("lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _lock_file(self, suffix: str) -> Path:
        if self.path.parts[0].startswith("~"):
            raise OSError("this user has no home: set BENTOML_HOME to a folder that can be written")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.with_suffix(f".{suffix}")

    def _read_lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_QUEUE_BYTES + 1)
        except FileNotFoundError:
            return []
        if len(content) > MAX_QUEUE_BYTES:
            raise OSError(f"the queue {self.path} is larger than {MAX_QUEUE_BYTES} bytes")
        return content.splitlines(keepends=True)

    def _reject(self, lines: list[bytes]) -> None:
        _append(self.rejected_path, b"".join(line.rstrip(b"\n") + b"\n" for line in lines))

    def _rewrite(self, lines: list[bytes]) -> None:
        # One name for all, under the lock: what a killed process leaves, the next one replaces.
        draft = self.path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        try:
            _append(draft, b"".join(lines))
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)


def _append(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _to_line(link: PackageLink) -> bytes:
    return json.dumps(asdict(link), sort_keys=True).encode() + b"\n"


def _from_line(line: bytes) -> PackageLink | None:
    """The link on a line, or None when there is none."""
    try:
        data = json.loads(line)
        link = PackageLink(**data)
        is_read = (link.facts, link.parts) == (
            read_facts(link.facts),
            read_parts({"parts": link.parts}),
        )
    except (ValueError, TypeError, RecursionError, TrackingError):
        return None
    places = (link.tracking_uri, link.project_name)
    is_text = all(isinstance(place, str) and place for place in places)
    has_run = link.run_id is None or isinstance(link.run_id, str)
    return link if is_text and has_run and is_read else None
