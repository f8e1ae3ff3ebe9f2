"""What `log_model` takes and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlops.client.weights import checkpoint_files, files_digest, write_weights
from mlops.errors import TrackingError


def read_header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_numpy_arrays_become_safetensors(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3).T  # not contiguous
    write_weights({"layers": [{"weight": array}], "bias": np.ones(3, np.int8)}, tmp_path)

    from safetensors.numpy import load_file

    loaded = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded["layers.0.weight"], array)
    assert loaded["layers.0.weight"].dtype == np.float64
    description = json.loads((tmp_path / "mlops-model.json").read_text())
    assert description["num_parameters"] == 9
    assert description["tensors"]["bias"] == {"shape": [3], "dtype": "int8"}


def test_a_module_keeps_its_names_and_types(tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx import nn

    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    model.set_dtype(mx.bfloat16)
    write_weights(model, tmp_path)
    header = read_header(tmp_path / "model.safetensors")
    assert header["layers.0.weight"]["shape"] == [2, 4]
    assert header["layers.1.bias"]["dtype"] == "BF16"
    description = json.loads((tmp_path / "mlops-model.json").read_text())
    assert description["class"].endswith("Sequential")
    assert description["tensors"]["layers.1.bias"]["dtype"] == "bfloat16"


class Unsafe:
    def __reduce__(self) -> Any:
        raise AssertionError("pickled")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unsafe(), r"takes the folder of a checkpoint.*not .*Unsafe"),
        (None, "not NoneType"),
        (b"bytes", "not bytes"),
        ({}, "needs arrays"),
        ({"a": Unsafe()}, "holds .*Unsafe"),
        ({"a": np.array([Unsafe()])}, "holds numpy.ndarray"),
        ({"a": np.ones(2), "b": 1.5}, "holds float"),
        ({"a.b": np.ones(2), "a": {"b": np.ones(2)}}, "a name of its own"),
    ],
)
def test_anything_else_is_refused(model: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=message):
        write_weights(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mixture_of_libraries_is_refused(tmp_path: Path) -> None:
    import mlx.core as mx

    with pytest.raises(TrackingError, match="mixture"):
        write_weights({"a": np.ones(2), "b": mx.ones(2)}, tmp_path)


def test_a_checkpoint_is_its_files_without_pickles(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x04pickle")
    files = checkpoint_files(tmp_path)
    assert [file.relative_path for file in files] == ["config.json", "model.safetensors"]
    digest = files_digest(files)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert files_digest(checkpoint_files(tmp_path)) != digest


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04pickle")
    with pytest.raises(TrackingError, match="no weights that are safe"):
        checkpoint_files(tmp_path)
    with pytest.raises(TrackingError, match="no checkpoint at"):
        checkpoint_files(tmp_path / "missing")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(TrackingError, match="link that leads out"):
        checkpoint_files(folder)
