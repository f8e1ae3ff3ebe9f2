"""A layer of the base in an adapter's file has the base's values, in its type or in a wider one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.tensor_values import is_copy


def halves(count: int) -> bytes:
    """Numbers in bfloat16; nobody reads what they are."""
    return bytes(number % 251 for number in range(2 * count))


def tensor(file: Path, dtype: str, content: bytes, shape: tuple[int, ...]) -> TensorInfo:
    file.write_bytes(content)
    return TensorInfo(dtype, shape, file.name, 0, len(content))


@pytest.mark.parametrize("rows", [1, 700_000])  # in one piece, and in several
def test_values_are_compared_whatever_their_width(tmp_path: Path, rows: int) -> None:
    base, same, wide = (tmp_path / name for name in ("base", "same", "wide"))
    content = halves(rows * 3)
    original = tensor(base, "BF16", content, (rows, 3))
    widened = b"".join(b"\0\0" + content[at : at + 2] for at in range(0, len(content), 2))
    assert is_copy(same, tensor(same, "BF16", content, (rows, 3)), base, original)
    assert is_copy(wide, tensor(wide, "F32", widened, (rows, 3)), base, original)
    other = widened[:-4] + b"\1" + widened[-3:]
    assert not is_copy(wide, tensor(wide, "F32", other, (rows, 3)), base, original)
    assert not is_copy(same, tensor(same, "F16", content, (rows, 3)), base, original)
    assert not is_copy(same, tensor(same, "BF16", content, (3, rows)), base, original)
