"""The header of a safetensors file, read strictly: every byte of the file is accounted for.

A file is an unsigned little-endian 64-bit length, a JSON header of that length, and the data. The
header is believed only when tensors fill the data exactly, without gap, overlap or rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.refusal import refusal
from mlops.counts import count

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the format allows."""

MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 1024

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, by dtype."""


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file holds.

    Attributes:
        tensors: by name; their `file` is the file's own name.
        metadata: the free text pairs of `__metadata__`.
        data_offset: position of the first byte of data.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_offset: int


def read_header(path: str | Path, name: str | None = None) -> SafetensorsHeader:
    """Read and check the header; the data is not read.

    Args:
        path: the file.
        name: what messages and `TensorInfo.file` call it; by default its file name.

    Raises:
        PackagingError: the file is truncated, or its header does not describe it exactly.
    """
    path = Path(path)
    name = name or path.name
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length < 2 or length > file_bytes - 8:
                raise _damaged(path, name, "it is shorter than its header says")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, name, f"its header of {length} bytes is over the limit")
            raw = file.read(length)
    except OSError as exc:
        raise refusal(f"{name} cannot be read: {exc.strerror}", path, file=name) from exc
    if len(raw) < length:
        raise _damaged(path, name, "it is shorter than its header says")
    try:
        return _parse(raw, name, data_offset=8 + length, data_bytes=file_bytes - 8 - length)
    except _Lie as exc:
        raise _damaged(path, name, str(exc)) from exc


class _Lie(Exception):  # noqa: N818 - never leaves this module
    """What a header says cannot be true."""


def _damaged(path: Path, name: str, reason: str) -> Exception:
    return refusal(
        f"{name} is not a whole safetensors file: {reason}; copy or save it again", path, file=name
    )


def _parse(raw: bytes, name: str, data_offset: int, data_bytes: int) -> SafetensorsHeader:
    if not raw.startswith(b"{"):
        raise _Lie("its header is not JSON")
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as exc:
        raise _Lie("its header is not JSON") from exc
    metadata = header.pop("__metadata__", None) or {}  # mlx writes null when there is none
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _Lie("its metadata is not text")
    tensors = {
        key: _tensor(key, entry, name, data_offset, data_bytes) for key, entry in header.items()
    }
    end = data_offset
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise _Lie(f"tensor {key!r} overlaps another or leaves a gap")
        end += tensor.nbytes
    if end != data_offset + data_bytes:
        raise _Lie(f"{count(data_offset + data_bytes - end, 'byte')} too many at its end")
    return SafetensorsHeader(tensors, metadata, data_offset)


def _tensor(key: str, entry: Any, name: str, data_offset: int, data_bytes: int) -> TensorInfo:
    if not key or len(key) > MAX_NAME_LENGTH or not key.isprintable():
        raise _Lie(f"{key[:80]!r} is not a tensor name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Lie(f"tensor {key!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Lie(f"tensor {key!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _Lie(f"tensor {key!r} has no valid shape")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise _Lie(f"tensor {key!r} has no valid data_offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise _Lie(f"tensor {key!r} lies outside the file")
    if prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise _Lie(f"tensor {key!r} of {dtype} {shape} does not take {count(end - begin, 'byte')}")
    return TensorInfo(dtype, tuple(shape), name, data_offset + begin, end - begin)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Lie("its header names the same key twice")
    return found


def _no_constant(text: str) -> Any:
    raise _Lie(f"its header holds {text}")
