"""What the bytes of an adapter show: zeros, infinity, NaN, and whether two tensors are the same."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.checkpoints import check_finite, recognise
from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.tensor_values import have_same_bytes, is_finite, is_zero
from mlops.errors import PackagingError

MIB = 1 << 20


def tensor(dtype: str, data: bytes, offset: int = 0) -> TensorInfo:
    width = 4 if dtype == "F32" else 2
    return TensorInfo(dtype, (len(data) // width,), "x", offset, len(data))


@pytest.mark.parametrize(
    ("dtype", "data", "finite"),
    [
        ("F32", struct.pack("<3f", 1, -2, 3.4e38), True),
        ("F32", struct.pack("<3f", 1, 2, float("inf")), False),
        ("F32", struct.pack("<3f", float("-inf"), 2, 3), False),
        ("F32", struct.pack("<3f", 1, float("nan"), 3), False),
        ("F32", bytes(2 * MIB) + struct.pack("<f", float("nan")), False),
        ("F16", struct.pack("<3e", 1, -65504, 0), True),
        ("F16", struct.pack("<3e", 1, float("inf"), 0), False),
        ("F16", struct.pack("<3e", 1, 2, float("nan")), False),
        ("BF16", struct.pack("<3f", 1, -2, 3e38), True),
        ("BF16", b"\x80\x7f\x00\x00", False),
        ("BF16", b"\x00\x00\xc0\xff", False),
        ("BF16", b"\x7f\x7f\x80\x7e", True),
        ("F32", b"", True),
    ],
)
def test_infinity_and_nan_are_seen(tmp_path: Path, dtype: str, data: bytes, finite: bool) -> None:
    (tmp_path / "x").write_bytes(b"head" + data)
    assert is_finite(tmp_path / "x", tensor(dtype, data, 4)) is finite


@given(st.lists(st.floats(width=32), max_size=8))
def test_any_numbers(tmp_path_factory: pytest.TempPathFactory, numbers: list[float]) -> None:
    file = tmp_path_factory.getbasetemp() / "any-numbers"
    data = struct.pack(f"<{len(numbers)}f", *numbers)
    file.write_bytes(b"head" + data)
    of_file = tensor("F32", data, 4)
    assert is_finite(file, of_file) == all(abs(number) < float("inf") for number in numbers)
    assert is_zero(file, of_file) == (not any(numbers))


def test_tensors_that_are_the_same(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data + data + data[:-1] + b"z")
    first, second, third = (tensor("F32", data, place * len(data)) for place in range(3))
    assert have_same_bytes(tmp_path / "x", first, second)
    assert not have_same_bytes(tmp_path / "x", first, third)
    assert not have_same_bytes(tmp_path / "x", first, tensor("F16", data, len(data)))
    assert not have_same_bytes(tmp_path / "x", first, tensor("F32", data[:-4], len(data)))


@pytest.mark.parametrize("spoilt", ["lora_a", "lora_b", "m"])
def test_an_adapter_with_nan_is_refused_by_the_tensors_name(tmp_path: Path, spoilt: str) -> None:
    header, data = {}, b""
    for part, shape in {"lora_a": [2, 1], "lora_b": [1, 2], "m": [2]}.items():
        values = struct.pack("<2f", 1, float("nan") if part == spoilt else 1)
        offsets = [len(data), len(data) + len(values)]
        header[f"q.{part}"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += values
    raw = json.dumps(header).encode()
    (tmp_path / "adapters.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    config = {"fine_tune_type": "dora", "lora_parameters": {"scale": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PackagingError, match=f"^q.{spoilt} of the adapter .* infinity or NaN"):
        check_finite(recognise(tmp_path))
