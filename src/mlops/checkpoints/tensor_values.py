"""What the values of tensors show, read from their bytes without an array library."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.safetensors import BITS

_CHUNK_BYTES = 1 << 20

_EXPONENT_BITS = {"F32": (0x7F, 0x80), "BF16": (0x7F, 0x80), "F16": (0x7C, 0x00)}
"""In the last byte of a number and the one before: all of them are set in infinity and NaN."""


def is_zero(path: Path, tensor: TensorInfo) -> bool:
    """True when all elements are 0 or -0, in any floating-point type."""
    width = BITS[tensor.dtype] // 8
    for chunk in _chunks(path, tensor):
        if not chunk.strip(b"\x00"):
            continue
        signs = chunk[width - 1 :: width]  # little-endian: the sign is in the last byte
        if signs.strip(b"\x00\x80") or any(
            chunk[place::width].strip(b"\x00") for place in range(width - 1)
        ):
            return False
    return True


def is_finite(path: Path, tensor: TensorInfo) -> bool:
    """True when no element is infinity or NaN; F32, F16 and BF16."""
    width = BITS[tensor.dtype] // 8
    tables = [_table(bits) for bits in _EXPONENT_BITS[tensor.dtype]]
    for chunk in _chunks(path, tensor):
        last, before = (
            int.from_bytes(chunk[width - place :: width].translate(table), "little")
            for place, table in enumerate(tables, start=1)
        )
        if last & before:
            return False
    return True


def have_same_bytes(
    path: Path, one: TensorInfo, other: TensorInfo, path_of_other: Path | None = None
) -> bool:
    """True when two tensors, of one file or of two, have the same type, shape and content."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        mine == theirs
        for mine, theirs in zip(
            _chunks(path, one), _chunks(path_of_other or path, other), strict=True
        )
    )


def is_copy(path: Path, tensor: TensorInfo, source: Path, original: TensorInfo) -> bool:
    """True when a tensor of one file has the values of another file's, of its type or, where that
    is bfloat16, in float32."""
    if (tensor.dtype, original.dtype) != ("F32", "BF16"):
        return have_same_bytes(path, tensor, original, source)
    return tensor.shape == original.shape and all(
        _widened(theirs) == mine
        for mine, theirs in zip(
            _chunks(path, tensor), _chunks(source, original, _CHUNK_BYTES // 2), strict=True
        )
    )


def _widened(chunk: bytes) -> bytes:
    """bfloat16 as float32: the same number, with two bytes of zeros below."""
    wide = bytearray(2 * len(chunk))
    wide[2::4], wide[3::4] = chunk[::2], chunk[1::2]
    return bytes(wide)


def _table(bits: int) -> bytes:
    """For `bytes.translate`: 1 for bytes in which all of these bits are set, else 0."""
    return bytes(byte & bits == bits for byte in range(256))


def _chunks(path: Path, tensor: TensorInfo, size: int = _CHUNK_BYTES) -> Iterator[bytes]:
    """A tensor's bytes, each time a whole number of elements."""
    if not tensor.nbytes:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        end = tensor.offset + tensor.nbytes
        for start in range(tensor.offset, end, size):
            yield view[start : min(start + size, end)]
