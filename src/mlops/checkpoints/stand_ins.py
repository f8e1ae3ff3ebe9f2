"""What lies under a file's name in its stead: a Git LFS pointer, a web page, half a download.

All of these happen when a model is copied. Said here, before a parser says something about bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mlops.checkpoints.files import CheckpointFile, read_start
from mlops.checkpoints.pooling import MODULES
from mlops.checkpoints.refusal import refusal

LEFTOVERS = (
    ".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download", ".filepart", ".!qb",
)  # fmt: skip
"""What downloaders add to the name of a file that they have not finished."""

_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)
_START_BYTES = 1024
_NEVER_EMPTY = frozenset({".safetensors", ".json", ".model", ".tiktoken"})
_NEVER_A_PAGE = _NEVER_EMPTY | {".txt", ".onnx", ".pt2", ".mlmodel", ".mlxfn"}
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")
_ERROR_KEYS = frozenset(
    {
        "error", "errors", "error_code", "error_message", "message", "detail", "details", "code",
        "status", "statusCode", "path", "timestamp", "requestId", "request_id", "trace_id",
    }
)  # fmt: skip
"""What the answers of servers consist of when they have no file."""


def refuse_stand_ins(folder: Path, files: Iterable[CheckpointFile]) -> None:
    """Raise `PackagingError` for the first of these files that is something else in its stead.

    Of an empty `modules.json` it is enough that there are no embeddings, which `read_pooling` says.
    """
    for file in files:
        name = file.relative_path
        suffix = PurePosixPath(name).suffix.lower()
        start = read_start(file, _START_BYTES)
        if start.startswith(_POINTERS):
            raise refusal(
                f"{name} in {folder} is a Git LFS pointer, not the file itself: run `git lfs pull` "
                "there, or download it again",
                folder,
                file=name,
            )
        if not start and suffix in _NEVER_EMPTY and name != MODULES:
            raise refusal(
                f"{name} in {folder} is empty; copy or download it again", folder, file=name
            )
        if found := _answer_of_a_server(suffix, start, file.size):
            raise refusal(
                f"{name} in {folder} holds {found}, as a server gives it in place of a file; "
                "download it again",
                folder,
                file=name,
            )


def refuse_unfinished(folder: Path, names: Iterable[str], wanted: set[str]) -> None:
    """Raise `PackagingError` when a download of one of the `wanted` files has not ended.

    Some downloaders give the file its whole size at once: it looks whole, and is not.

    Args:
        names: of all files in the folder.
    """
    for name in names:
        base = unfinished(name)
        if base in wanted:
            raise refusal(
                f"the download of {base} in {folder} is not finished, as {name} beside it says; "
                f"download it again, or remove {name} if {base} is whole",
                folder,
                file=base,
                leftover=name,
            )


def unfinished(name: str) -> str:
    """The file whose download left `name` behind; "" when none did."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in LEFTOVERS else ""


def _answer_of_a_server(suffix: str, start: bytes, size: int) -> str:
    """What a file of this suffix cannot begin with, in words; "" when all is well."""
    text = start.strip()
    if not text or suffix not in _NEVER_A_PAGE:
        return ""
    if text.lower().startswith(_PAGES):
        return "a web page"
    if suffix == ".safetensors" and len(start) >= 8 and _is_text(start[:8]):
        return f"text ({_quoted(text)})"  # its first 8 bytes are a length: never so large
    if suffix != ".json" or not _is_text(text):
        return ""
    if text[:1] not in (b"{", b"["):
        return f"text ({_quoted(text)})"
    return f"an error message ({_quoted(text)})" if _is_error(text, size) else ""


def _is_error(text: bytes, size: int) -> bool:
    if size > _START_BYTES:
        return False
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    is_error = isinstance(content, dict) and any("error" in key.lower() for key in content)
    is_error = is_error or (
        isinstance(content, dict) and bool({"message", "detail"} & set(content))
    )
    return is_error and set(content) <= _ERROR_KEYS


def _is_text(content: bytes) -> bool:
    return all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in content)


def _quoted(text: bytes) -> str:
    return repr(text[:60].decode("ascii", "replace"))
