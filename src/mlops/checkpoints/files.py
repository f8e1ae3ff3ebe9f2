"""Which files a checkpoint folder holds, and their small JSON files.

What a folder holds is not trusted: a link that leads out of it, a device or a name that is no text
is refused, and depth and number are bounded. One kind of link is allowed to leave: the Hugging Face
cache keeps a model's files in `blobs` and links to them from `snapshots/REVISION`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlops.checkpoints.refusal import refusal

MAX_DEPTH = 16
MAX_FILES = 100_000
MAX_JSON_BYTES = 64 * 1024 * 1024

LITTER = frozenset({"__pycache__", "__MACOSX", "Thumbs.db", "desktop.ini", "Icon\r"})
"""Skipped, as is every name that begins with a dot."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint.

    Attributes:
        relative_path: with forward slashes, relative to the folder.
        path: the regular file to read, links resolved.
        size: in bytes.
    """

    relative_path: str
    path: Path
    size: int


def list_files(
    folder: str | Path, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[CheckpointFile]:
    """The files under `folder`, ordered by relative path; for a single file, that file.

    Hidden files, caches and what operating systems strew about are left out. So are pickles (the
    optimizer states and training arguments of trainers): nothing here ever opens one.

    Args:
        include: globs of which one must match; all files when empty.
        exclude: globs of which none may match. A glob without a slash (`*.json`) matches a name at
            any depth, one with a slash (`logs/*.txt`) is relative to `folder`, `**` stands for any
            number of folders. What matches a folder matches all in it. A glob may match nothing.

    Raises:
        PackagingError: a link leads out of the folder, something is no regular file, a name is no
            text, or there are too many files.
    """
    folder = Path(folder)
    root = folder.resolve()
    if root.is_file():
        found = [CheckpointFile(folder.name, root, root.stat().st_size)]
    else:
        found = []
        for file in _walk(root, root, _allowed_roots(root), 0):
            found.append(file)
            if len(found) > MAX_FILES:
                raise refusal(
                    f"{folder} holds more than {MAX_FILES} files; give the folder of one model",
                    folder,
                )
    return sorted(
        (
            file
            for file in found
            if (not include or _matches_any(include, file)) and not _matches_any(exclude, file)
        ),
        key=lambda file: file.relative_path,
    )


def read_json(file: CheckpointFile) -> dict[str, Any]:
    """The object in a JSON file of bounded size.

    Raises:
        PackagingError: it is too large, not UTF-8, not JSON or not an object.
    """
    content = _read_json(file)
    if not isinstance(content, dict):
        raise refusal(
            f"{file.relative_path} is not a JSON object", file.path, file=file.relative_path
        )
    return content


def read_json_list(file: CheckpointFile) -> list[Any]:
    """The list in a JSON file of bounded size.

    Raises:
        PackagingError: it is too large, not UTF-8, not JSON or not a list.
    """
    content = _read_json(file)
    if not isinstance(content, list):
        raise refusal(
            f"{file.relative_path} is not a JSON list", file.path, file=file.relative_path
        )
    return content


def _read_json(file: CheckpointFile) -> Any:
    name = file.relative_path
    if file.size > MAX_JSON_BYTES:
        raise refusal(
            f"{name} is {file.size} bytes long, over the limit of {MAX_JSON_BYTES}",
            file.path,
            file=name,
        )
    try:
        with file.path.open("rb") as stream:
            return json.loads(stream.read(MAX_JSON_BYTES).decode("utf-8"))
    except OSError as exc:
        raise refusal(f"{name} cannot be read: {exc.strerror}", file.path, file=name) from exc
    except (ValueError, RecursionError) as exc:
        raise refusal(f"{name} is not valid JSON: {exc}", file.path, file=name) from exc


def is_pickle(path: Path) -> bool:
    """True for a pickle or an archive of `torch.save`; a `.bin` is judged by its first bytes."""
    suffix = path.suffix.lower()
    if suffix != ".bin":
        return suffix in PICKLE_SUFFIXES
    with path.open("rb") as file:
        start = file.read(4096)
    is_protocol = len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2] != 0
    return is_protocol or (start.startswith(b"PK\x03\x04") and b"data.pkl" in start)


def _walk(
    folder: Path, root: Path, allowed: tuple[Path, ...], depth: int
) -> Iterator[CheckpointFile]:
    if depth > MAX_DEPTH:
        raise refusal(f"{root} has folders nested more than {MAX_DEPTH} deep", root)
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except OSError as exc:
        raise refusal(f"{folder} cannot be read: {exc.strerror}", folder) from exc
    for entry in ordered:
        if entry.name.startswith(".") or entry.name in LITTER:
            continue
        if not entry.name.isprintable():
            raise refusal(
                f"a file name in {folder} is not printable text: {entry.name!a}; rename it",
                folder,
                file=ascii(entry.name),
            )
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root, allowed, depth + 1)
        else:
            file = _regular_file(path, root, allowed)
            if file is not None:
                yield file


def _regular_file(path: Path, root: Path, allowed: tuple[Path, ...]) -> CheckpointFile | None:
    """The file behind a path or link; None for a pickle, which is left out."""
    relative = path.relative_to(root).as_posix()
    try:
        target = path.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as exc:
        raise refusal(
            f"{relative} cannot be read: a link that leads nowhere", root, file=relative
        ) from exc
    if not any(target.is_relative_to(place) for place in allowed):
        raise refusal(
            f"{relative} is a link that leads out of the folder, to {target}; put the file itself "
            "in its place",
            root,
            file=relative,
            target=str(target),
        )
    if not stat.S_ISREG(status.st_mode):
        raise refusal(f"{relative} is not a regular file; remove it", root, file=relative)
    try:
        if is_pickle(path):
            return None
    except OSError as exc:
        raise refusal(f"{relative} cannot be read: {exc.strerror}", root, file=relative) from exc
    return CheckpointFile(relative, target, status.st_size)


def _allowed_roots(root: Path) -> tuple[Path, ...]:
    """Where links may lead: into the folder, and from a hub snapshot into its own model's blobs."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return root, place.parent.parent / "blobs"
    return (root,)


def _matches_any(patterns: Sequence[str], file: CheckpointFile) -> bool:
    parts = file.relative_path.split("/")
    return any(_matches(pattern, parts) for pattern in patterns)


def _matches(pattern: str, parts: list[str]) -> bool:
    segments = pattern.removeprefix("./").strip("/").split("/")
    if len(segments) == 1 and not pattern.startswith(("/", "./")):
        segments.insert(0, "**")
    reached = {0}  # how many parts of the path the segments so far can stand for
    for segment in segments:
        if segment == "**":
            reached = set(range(min(reached), len(parts) + 1))
        else:
            reached = {
                end + 1 for end in reached if end < len(parts) and fnmatchcase(parts[end], segment)
            }
        if not reached:
            return False
    return True
