"""Only a safetensors file that its header describes exactly is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops.checkpoints import read_header
from mlops.errors import PackagingError
from tiny_models import write_safetensors

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def tensor(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_tensors_metadata_and_offset_are_read(tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "w.safetensors", {"a": (2, 3), "empty": (0,)}, metadata={"format": "mlx"}
    )
    header = read_header(path)
    assert header.metadata == {"format": "mlx"}
    assert header.tensors["a"].shape == (2, 3)
    assert header.tensors["a"].nbytes == 24
    assert header.tensors["a"].offset == header.data_offset
    assert header.tensors["a"].file == "w.safetensors"
    assert header.tensors["empty"].nbytes == 0


def test_metadata_may_be_null(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {"__metadata__": None, **GOOD}, bytes(8))
    assert read_header(path).metadata == {}


def test_elements_smaller_than_a_byte_count_by_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {"a": tensor(0, 2, [4], "F4")}, bytes(2))
    assert read_header(path).tensors["a"].nbytes == 2


def test_a_header_is_read_without_the_data(tmp_path: Path) -> None:
    size = 1 << 40  # a sparse file: reading a terabyte would not end
    path = write(tmp_path / "w", {"a": tensor(0, size)}, b"")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert read_header(path).tensors["a"].nbytes == size


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (GOOD, b"", "lies outside the file"),
        (GOOD, bytes(7), "lies outside the file"),
        (GOOD, bytes(9), "1 byte too many at its end"),
        (b"[]", b"", "not JSON"),
        (b'{"a": ', b"", "not JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "not JSON"),
        (b"{\xff}", b"", "not JSON"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"0", "JSON"),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"0", "NaN"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"0",
            "the same key twice",
        ),
        ({"__metadata__": {"format": 1}}, b"", "metadata is not text"),
        ({"__metadata__": "mlx"}, b"", "metadata is not text"),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6), "overlaps another or leaves a gap"),
        ({"a": tensor(0, 4), "b": tensor(6, 8)}, bytes(8), "overlaps another or leaves a gap"),
        ({"a": tensor(4, 8)}, bytes(8), "overlaps another or leaves a gap"),
        ({"a": tensor(0, 4, [5])}, bytes(4), "does not take 4 bytes"),
        ({"a": tensor(0, 4, [2], "F32")}, bytes(4), "does not take 4 bytes"),
        ({"a": tensor(0, 4, dtype="F33")}, bytes(4), "unknown dtype"),
        ({"a": tensor(0, 4, dtype=[])}, bytes(4), "unknown dtype"),
        ({"a": tensor(0, 4, [-4])}, bytes(4), "no valid shape"),
        ({"a": tensor(0, 4, [True, 4])}, bytes(4), "no valid shape"),
        ({"a": tensor(0, 4, [4.0])}, bytes(4), "no valid shape"),
        ({"a": tensor(0, 4, [2**63, 0])}, bytes(4), "no valid shape"),
        ({"a": tensor(0, 4, [1] * 17)}, bytes(4), "no valid shape"),
        ({"a": {**tensor(0, 4), "data_offsets": [4, 0]}}, bytes(4), "lies outside the file"),
        ({"a": {**tensor(0, 4), "data_offsets": [0]}}, bytes(4), "no valid data_offsets"),
        ({"a": {"dtype": "U8"}}, b"", "not described by"),
        ({"a": 1}, b"", "not described by"),
        ({"": tensor(0, 4)}, bytes(4), "not a tensor name"),
        ({"a\nb": tensor(0, 4)}, bytes(4), "not a tensor name"),
        ({"\ud800": tensor(0, 4)}, bytes(4), "not a tensor name"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: bytes, reason: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(PackagingError, match="not a whole safetensors file") as caught:
        read_header(path)
    assert reason in str(caught.value)
    assert caught.value.operation == "recognise"
    assert caught.value.details == {"path": str(path), "file": "model.safetensors"}


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "w", GOOD, bytes(8), length)
    with pytest.raises(PackagingError, match="not a whole safetensors file"):
        read_header(path)


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "w", b"", b"", 100_000_001)
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(PackagingError, match="over the limit"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\x02", b"1234567"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w"
    path.write_bytes(content)
    with pytest.raises(PackagingError, match="shorter than its header says"):
        read_header(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match="cannot be read"):
        read_header(tmp_path / "none")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4"]) | json_values,
        "shape": st.lists(st.integers(-2, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2) | json_values,
    }
)
fuzz = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_or_refuse(path: Path) -> None:
    """Whatever the bytes: a header that covers the file exactly, or PackagingError."""
    try:
        header = read_header(path)
    except PackagingError:
        return
    covered = header.data_offset + sum(item.nbytes for item in header.tensors.values())
    assert covered == path.stat().st_size


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w"
    path.write_bytes(content)
    read_or_refuse(path)


@fuzz
@given(header=st.dictionaries(st.text(max_size=4), entries, max_size=3), size=st.integers(0, 40))
def test_any_header_is_read_or_refused(tmp_path: Path, header: Any, size: int) -> None:
    read_or_refuse(write(tmp_path / "w", header, bytes(size)))


@fuzz
@given(data=st.data())
def test_any_change_of_a_good_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = write_safetensors(tmp_path / "w", {"a": (2, 3), "b": (4,)}, metadata={"format": "mlx"})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_refuse(path)
