"""Quantized weights as other tools write them, packed here with numpy: nothing of MLX is used.

Each function takes a plain matrix and returns the tensors that stand for it in a file, and the
matrix that they mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]
Packed = tuple[dict[str, Matrix], Matrix]

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's: which of eight columns lies in each nibble of a word, the lowest first."""

DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.uint32): "U32",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int64): "I64",
}


def pack_bits(codes: Matrix, bits: int) -> Matrix:
    """Rows of small numbers as 32-bit words: a stream of bits, the lowest first."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    flat = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8)
    return np.packbits(flat, axis=-1, bitorder="little").view(np.uint32)


def grouped_codes(matrix: Matrix, bits: int, group_size: int) -> tuple[Matrix, Matrix, Matrix]:
    """Codes (out, in), and each group's scale and lowest value (out, groups)."""
    groups = matrix.reshape(matrix.shape[0], -1, group_size)
    low = groups.min(-1, keepdims=True)
    scale = (groups.max(-1, keepdims=True) - low) / (2**bits - 1)
    codes = np.rint((groups - low) / scale).astype(np.int64)
    return codes.reshape(matrix.shape), scale[..., 0], low[..., 0]


def affine(matrix: Matrix, bits: int, group_size: int = 32) -> Packed:
    codes, scales, biases = grouped_codes(matrix, bits, group_size)
    meant = codes * np.repeat(scales, group_size, 1) + np.repeat(biases, group_size, 1)
    tensors = {"weight": pack_bits(codes, bits), "scales": scales, "biases": biases}
    return tensors, meant.astype(np.float32)


def awq(matrix: Matrix, group_size: int = 32) -> Packed:
    """AutoAWQ's gemm: transposed, eight columns in a word."""
    codes, scales, low = grouped_codes(matrix, 4, group_size)
    zeros = np.clip(np.rint(-low / scales), 0, 15).astype(np.int64)
    scales = scales.astype(np.float16)
    meant = (codes - np.repeat(zeros, group_size, 1)) * np.repeat(scales, group_size, 1)
    tensors = {"qweight": _awq_words(codes.T), "qzeros": _awq_words(zeros.T), "scales": scales.T}
    return tensors, meant.astype(np.float32)


def _awq_words(codes: Matrix) -> Matrix:
    columns = codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER]
    return (columns << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)


def compressed_int4(matrix: Matrix, group_size: int = 32) -> Packed:
    """compressed-tensors' pack-quantized, symmetric: numbers from -8 to 7, stored with 8 more."""
    groups = matrix.reshape(matrix.shape[0], -1, group_size)
    scales = (np.abs(groups).max(-1) / 7.5).astype(np.float32)
    codes = np.clip(np.rint(groups / scales[..., None]), -8, 7).astype(np.int64)
    tensors = {
        "weight_packed": pack_bits(codes.reshape(matrix.shape) + 8, 4).view(np.int32),
        "weight_scale": scales,
        "weight_shape": np.array(matrix.shape, np.int64),
    }
    return tensors, (codes * scales[..., None]).reshape(matrix.shape).astype(np.float32)


def fp4_codes(matrix: Matrix, group_size: int) -> tuple[Matrix, Matrix, Matrix]:
    """Codes, and for each group the exponent of its scale (2 to the power of e - 127)."""
    groups = matrix.reshape(*matrix.shape[:-1], -1, group_size)
    exponents = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True) / 4)).astype(np.int64)
    scaled = groups / 2.0**exponents
    codes = np.abs(scaled[..., None] - FP4).argmin(-1)
    meant = (FP4[codes] * 2.0**exponents).reshape(matrix.shape).astype(np.float32)
    return codes.reshape(matrix.shape), (exponents[..., 0] + 127).astype(np.uint8), meant


def mxfp4(matrix: Matrix) -> Packed:
    codes, scales, meant = fp4_codes(matrix, 32)
    return {"weight": pack_bits(codes, 4), "scales": scales}, meant


def fp8_values() -> Matrix:
    """What each byte means as E4M3, the two that are not numbers as 0."""
    bytes_ = np.arange(256)
    exponent, fraction = (bytes_ >> 3) & 15, (bytes_ & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    size[(bytes_ & 127) == 127] = 0
    return np.where(bytes_ > 127, -size, size).astype(np.float32)


def mxfp8(matrix: Matrix) -> Packed:
    groups = matrix.reshape(matrix.shape[0], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True) / 256)).astype(np.int64)
    values = fp8_values()
    codes = np.abs((groups / 2.0**exponents)[..., None] - values).argmin(-1)
    meant = (values[codes] * 2.0**exponents).reshape(matrix.shape).astype(np.float32)
    words = codes.astype(np.uint8).reshape(matrix.shape).view(np.uint32)
    return {"weight": words, "scales": (exponents[..., 0] + 127).astype(np.uint8)}, meant


def nvfp4(matrix: Matrix) -> Packed:
    """Groups of 16, each with a scale that is an E4M3 number."""
    groups = matrix.reshape(matrix.shape[0], -1, 16)
    values = fp8_values()
    wanted = np.abs(groups).max(-1) / 6
    scales = np.abs(wanted[..., None] - values[:127]).argmin(-1).astype(np.uint8)
    scale = np.maximum(values[scales], 2.0**-9)[..., None]
    codes = np.abs((groups / scale)[..., None] - FP4).argmin(-1)
    meant = (FP4[codes] * values[scales][..., None]).reshape(matrix.shape).astype(np.float32)
    return {"weight": pack_bits(codes.reshape(matrix.shape), 4), "scales": scales}, meant


def fp8_blocks(matrix: Matrix, block: int = 128) -> Packed:
    """DeepSeek's: bytes (E4M3), and a scale for each block of 128 by 128; bfloat16 is meant."""
    rows, columns = (-(-length // block) for length in matrix.shape)
    padded = np.zeros((rows * block, columns * block), np.float32)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocks = padded.reshape(rows, block, columns, block)
    scales = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
    values = fp8_values()
    spread = np.repeat(np.repeat(scales, block, 0), block, 1)[: matrix.shape[0], : matrix.shape[1]]
    codes = np.abs((matrix / spread)[..., None] - values).argmin(-1).astype(np.uint8)
    return {"weight": codes, "weight_scale_inv": scales}, bfloat16(values[codes] * spread)


def bfloat16(matrix: Matrix) -> Matrix:
    """Rounded to the upper 16 bits of a float32, ties to even."""
    words = matrix.astype(np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def write_tensors(
    path: Path, tensors: Mapping[str, Matrix], dtypes: Mapping[str, str] | None = None
) -> None:
    """A safetensors file; `dtypes` names those that numpy does not have."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        dtype = (dtypes or {}).get(name, DTYPES[array.dtype])
        shape = list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
