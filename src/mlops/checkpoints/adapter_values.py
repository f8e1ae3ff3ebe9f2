"""What the values of an adapter's tensors show, read from their bytes without an array library."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from mlops.checkpoints.checkpoint import Checkpoint, TensorInfo
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.safetensors import BITS

_CHUNK_BYTES = 1 << 20

_EXPONENT_BITS = {"F32": (0x7F, 0x80), "BF16": (0x7F, 0x80), "F16": (0x7C, 0x00)}
"""In the last byte of a number and the one before: all of them are set in infinity and NaN."""


def adapter_delta_is_zero(adapter: Checkpoint) -> bool:
    """True when the adapter changes nothing: for every module A or B is all zeros, or the scale is.

    So are adapters before training. Only bytes are looked at, up to the first that is not zero.
    DoRA's magnitudes are not: they only ever move together with B.
    """
    if adapter.adapter is None:
        raise refusal(f"{adapter.path} is not an adapter", adapter.path, "adapter_delta_is_zero")
    return all(
        module.scale == 0
        or is_zero(module.file, adapter.tensors[module.key_b])
        or is_zero(module.file, adapter.tensors[module.key_a])
        for module in adapter.adapter.modules.values()
    )


def check_finite(adapter: Checkpoint) -> None:
    """Raise `PackagingError` when a tensor of an adapter holds infinity or NaN."""
    for module in adapter.adapter.modules.values() if adapter.adapter is not None else ():
        for key in (module.key_a, module.key_b, module.key_m):
            if key is not None and not is_finite(module.file, adapter.tensors[key]):
                raise refusal(
                    f"{key} of the adapter {adapter.path} holds infinity or NaN: the training went "
                    "astray; take an earlier checkpoint of it",
                    adapter.path,
                    "check_finite",
                    tensors=[key],
                )


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


def have_same_bytes(path: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """True when two tensors of a file have the same type, shape and content."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        mine == theirs
        for mine, theirs in zip(_chunks(path, one), _chunks(path, other), strict=True)
    )


def is_copy(path: Path, tensor: TensorInfo, source: Path, original: TensorInfo) -> bool:
    """True when a tensor of one file has the values of another file's, of its type or, where that
    is bfloat16, in float32."""
    if tensor.shape != original.shape:
        return False
    wider = (tensor.dtype, original.dtype) == ("F32", "BF16")
    if tensor.dtype != original.dtype and not wider:
        return False
    chunks = _chunks(path, tensor)
    originals = _chunks(source, original, _CHUNK_BYTES // 2 if wider else _CHUNK_BYTES)
    return all(
        _widened(theirs) == mine if wider else theirs == mine
        for mine, theirs in zip(chunks, originals, strict=True)
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
