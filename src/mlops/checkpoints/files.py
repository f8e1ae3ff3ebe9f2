"""Which files a checkpoint folder holds, and their small JSON files.

What a folder holds is not trusted: a link that leads out of it, a device or a name that is no text
is refused, and depth and number are bounded. One kind of link is allowed to leave: the Hugging Face
cache keeps a model's files in `blobs` and links to them from `snapshots/REVISION`.

Only a file that somebody asks for is looked at. What a trainer left beside a model, such as ten
thousand logs or a link to another disk, is known by name alone and stands in nobody's way.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from mlops.checkpoints.refusal import refusal

MAX_DEPTH = 16
MAX_FILES = 100_000
MAX_NAMES = 1_000_000
"""The most names that a folder may hold in all, whether anybody asks for them or not."""

MAX_JSON_BYTES = 64 * 1024 * 1024

LITTER = frozenset({"__pycache__", "__MACOSX", "Thumbs.db", "desktop.ini", "Icon\r"})
"""Skipped, as is every name that begins with a dot."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".so", ".dylib", ".dll"})


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


class Folder(Mapping[str, CheckpointFile]):
    """The files under a folder by relative path, in order; for a single file, that file.

    Hidden files, caches and what operating systems strew about are left out. Names are found at
    once; the file behind a name is checked when it is looked at, and refused then.

    Raises:
        PackagingError: the folder cannot be read, or holds more than `MAX_NAMES` names. Looking at
            a file: it is a link that leads out of the folder, no regular file, nested too deep, or
            its name is no text.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self._root = path.resolve()
        self._is_file = self._root.is_file()
        self._allowed = _allowed_roots(self._root)
        found = [path.name] if self._is_file else []
        for name in () if self._is_file else _walk(self._root):
            found.append(name)
            if len(found) > MAX_NAMES:
                raise _too_many(path, MAX_NAMES)
        self._files: dict[str, CheckpointFile | None] = dict.fromkeys(sorted(found))

    def __getitem__(self, name: str) -> CheckpointFile:
        file = self._files[name]
        if file is None:
            if self._is_file:
                file = CheckpointFile(name, self._root, self._root.stat().st_size)
            else:
                file = _regular_file(name, self._root, self._allowed)
            self._files[name] = file
        return file

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def at_top(self) -> list[str]:
        """Names of the files that lie in no folder below."""
        return [name for name in self._files if "/" not in name]


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
    files = Folder(folder)
    names = [
        name
        for name in files
        if (not include or matches_any(include, name)) and not matches_any(exclude, name)
    ]
    refuse_too_many(folder, names)
    return [files[name] for name in names if not is_pickle(files[name])]


def refuse_too_many(folder: str | Path, names: Collection[str]) -> None:
    """Raise `PackagingError` for more than `MAX_FILES` names of files that are to be read."""
    if len(names) > MAX_FILES:
        raise _too_many(folder, MAX_FILES)


def _too_many(folder: str | Path, limit: int) -> Exception:
    return refusal(f"{folder} holds more than {limit} files; give the folder of one model", folder)


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


def is_pickle(file: CheckpointFile) -> bool:
    """True for a pickle or an archive of `torch.save`; a `.bin` is judged by its first bytes.

    Raises:
        PackagingError: it cannot be read.
    """
    suffix = PurePosixPath(file.relative_path).suffix.lower()
    if suffix != ".bin":
        return suffix in PICKLE_SUFFIXES
    start = read_start(file, 4096)
    is_protocol = len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2] != 0
    return is_protocol or (start.startswith(b"PK\x03\x04") and b"data.pkl" in start)


def is_code(name: str) -> bool:
    """True for the name of a program or library, which is never run and never stored."""
    return PurePosixPath(name).suffix.lower() in CODE_SUFFIXES


def read_start(file: CheckpointFile, num_bytes: int) -> bytes:
    """The first bytes of a file; all of it when it is shorter.

    Raises:
        PackagingError: it cannot be read.
    """
    name = file.relative_path
    try:
        with file.path.open("rb") as stream:
            return stream.read(num_bytes)
    except OSError as exc:
        raise refusal(f"{name} cannot be read: {exc.strerror}", file.path, file=name) from exc


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all that is no folder, and of folders that cannot be entered."""
    waiting = [(root, "", 0)]
    while waiting:
        folder, prefix, depth = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in LITTER:
                        continue
                    name = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False) and depth < MAX_DEPTH:
                        waiting.append((folder / entry.name, f"{name}/", depth + 1))
                    else:
                        yield name
        except OSError as exc:
            if folder == root:
                raise refusal(f"{root} cannot be read: {exc.strerror}", root) from exc
            yield prefix.removesuffix("/")


def _regular_file(name: str, root: Path, allowed: tuple[Path, ...]) -> CheckpointFile:
    """The file behind a name or link."""
    if not name.isprintable():
        raise refusal(
            f"a file name in {root} is not printable text: {name!a}; rename it",
            root,
            file=ascii(name),
        )
    path = root / name
    try:
        target = path.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as exc:
        raise refusal(f"{name} cannot be read: a link that leads nowhere", root, file=name) from exc
    if not any(target.is_relative_to(place) for place in allowed):
        raise refusal(
            f"{name} is a link that leads out of the folder, to {target}; put the file itself "
            "in its place",
            root,
            file=name,
            target=str(target),
        )
    if stat.S_ISDIR(status.st_mode) and not path.is_symlink():
        too_deep = name.count("/") >= MAX_DEPTH
        raise refusal(
            f"{root} has folders nested more than {MAX_DEPTH} deep"
            if too_deep
            else f"the folder {name} cannot be read; allow reading it",
            root,
            file=name,
        )
    if not stat.S_ISREG(status.st_mode):
        raise refusal(f"{name} is not a regular file; remove it", root, file=name)
    return CheckpointFile(name, target, status.st_size)


def _allowed_roots(root: Path) -> tuple[Path, ...]:
    """Where links may lead: into the folder, and from a hub snapshot into its own model's blobs."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return root, place.parent.parent / "blobs"
    return (root,)


def matches_any(patterns: Sequence[str], name: str) -> bool:
    """True when one of the globs matches a relative path; `list_files` says how."""
    parts = name.split("/")
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
