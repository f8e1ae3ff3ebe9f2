"""The optimized BLAS in real processes: MLX really uses it, and says so when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mlops.hardware import blas, detect

pytestmark = pytest.mark.skipif(
    detect().mlx_backend != "cpu", reason="only MLX on a Linux CPU needs a BLAS from here"
)

PRINT_STATUS = """
import json, warnings
from dataclasses import asdict
from mlops.hardware import ensure_blas
with warnings.catch_warnings(record=True, action="always") as caught:
    status = ensure_blas()
    assert ensure_blas() is status
print(json.dumps([asdict(status), [str(warning.message) for warning in caught]]))
"""

PRINT_WHO_ANSWERS = """
import ctypes, json
from mlops.hardware.blas import _path_of_symbol
print(json.dumps(_path_of_symbol(ctypes.CDLL(None), "cblas_sgemm")))
"""

CHECK_RESULTS = """
import numpy as np
import mlx.core as mx

def close(ours, theirs):
    np.testing.assert_allclose(np.array(ours), theirs, rtol=2e-4, atol=2e-4)

random = np.random.default_rng(0)
for shape in ((1, 64, 64), (65, 130, 7), (256, 300, 128)):
    a = random.normal(size=shape[:2]).astype(np.float32)
    b = random.normal(size=shape[1:]).astype(np.float32)
    close(mx.array(a) @ mx.array(b), a @ b)
    close(mx.array(a) @ mx.array(np.ascontiguousarray(b.T)).T, a @ b)
    z = a + 1j * a[::-1]
    close(mx.array(z) @ mx.array(b.astype(np.complex64)), z @ b)

m = random.normal(size=(40, 40)).astype(np.float32)
spd = m @ m.T + 40 * np.eye(40, dtype=np.float32)
cpu = mx.cpu
u, s, vt = mx.linalg.svd(mx.array(m), stream=cpu)
close(s, np.linalg.svd(m)[1])
close((u * s) @ vt, m)
close(mx.linalg.inv(mx.array(spd), stream=cpu), np.linalg.inv(spd))
close(mx.linalg.cholesky(mx.array(spd), stream=cpu), np.linalg.cholesky(spd))
close(mx.linalg.cholesky_inv(mx.linalg.cholesky(mx.array(spd), stream=cpu), stream=cpu),
      np.linalg.inv(spd))
values, vectors = mx.linalg.eigh(mx.array(spd), stream=cpu)
close(values, np.linalg.eigh(spd)[0])
close((vectors * values) @ vectors.T, spd)
values, vectors = mx.linalg.eig(mx.array(m), stream=cpu)
close(mx.array(m.astype(np.complex64)) @ vectors, np.array(vectors * values))
q, r = mx.linalg.qr(mx.array(m), stream=cpu)
close(q @ r, m)
p, l, u = mx.linalg.lu(mx.array(m), stream=cpu)
close(l[p] @ u, m)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process whose BLAS is its own business."""
    inherited = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def answer(code: str, **environment: str) -> list[Any]:
    """What `code` prints, one JSON value a line."""
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def shims(cache: Path) -> list[Path]:
    return list(cache.rglob("*.so"))


def test_mlx_computes_with_the_optimized_blas_and_gets_the_same_numbers() -> None:
    (status, caught), who = answer(PRINT_STATUS + CHECK_RESULTS + PRINT_WHO_ANSWERS)

    assert status["optimized"] is True
    assert status["problem"] is None
    assert caught == []
    assert who == status["path"]


def test_every_symbol_that_mlx_takes_from_a_blas_is_in_the_shim() -> None:
    nm = shutil.which("nm")
    mlx = find_spec("mlx")
    if nm is None or mlx is None or not mlx.submodule_search_locations:
        pytest.skip(reason="needs nm")
    library = Path(mlx.submodule_search_locations[0]) / "lib" / "libmlx.so"
    listing = subprocess.run(
        [nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    needed = {name for _, name in map(str.split, listing.splitlines())}
    from_blas = {n for n in needed if n.startswith("cblas_") or (n[-1] == "_" and n[0] in "sdcz")}
    shim = Path(blas.__file__).with_name("blas_shim.c")

    assert from_blas
    assert [name for name in sorted(from_blas) if f"X({name})" not in shim.read_text()] == []


def test_the_shim_is_compiled_once_and_kept_private(cache: Path) -> None:
    first = answer(PRINT_STATUS, XDG_CACHE_HOME=str(cache))[0][0]
    if first["source"] != "scipy-openblas32":
        pytest.skip(reason="a system OpenBLAS comes first here")
    path = Path(first["path"])
    made = path.stat().st_mtime_ns

    # With no compiler to be found, only the kept one can be used.
    again = answer(PRINT_STATUS, XDG_CACHE_HOME=str(cache), PATH="/nonexistent")[0][0]

    assert again == first
    assert path.stat().st_mtime_ns == made
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_eight_processes_may_meet_at_an_empty_cache(cache: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_STATUS],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    results = [(process.communicate(timeout=240), process.returncode) for process in racing]

    assert [status for _, status in results] == [0] * 8, results
    paths = {json.loads(output)[0]["path"] for (output, _), _ in results}
    assert len(paths) == 1
    if shims(cache):
        assert [str(shim) for shim in shims(cache)] == list(paths)


def test_without_a_compiler_a_warning_names_the_fix_and_the_slow_down(cache: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(cache), "PATH": "/nonexistent"}
    status, caught = answer(PRINT_STATUS, **environment)[0]
    if status["source"] == "system":
        pytest.skip(reason="a system OpenBLAS needs no compiler")

    assert (status["optimized"], status["source"]) == (False, "reference")
    assert len(caught) == 1
    assert "no C compiler" in caught[0]
    assert "10 or more times longer" in caught[0]
    assert "apt install gcc" in caught[0]
    assert python(CHECK_RESULTS, **environment).returncode == 0


def test_importing_mlx_too_early_is_said() -> None:
    status, caught = answer("import mlx.core" + PRINT_STATUS)[0]

    assert status["optimized"] is False
    assert "before" in status["problem"]
    assert "mlops run -- COMMAND" in status["fix"]
    assert len(caught) == 1


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_cache_that_others_can_write_is_refused(cache: Path, mode: int) -> None:
    status = answer(PRINT_STATUS, XDG_CACHE_HOME=str(cache))[0][0]
    if status["source"] != "scipy-openblas32":
        pytest.skip(reason="a system OpenBLAS comes first here")
    Path(status["path"]).parent.chmod(mode)

    status, caught = answer(PRINT_STATUS, XDG_CACHE_HOME=str(cache))[0]

    assert status["optimized"] is False
    assert "another user" in status["problem"]
    assert "XDG_CACHE_HOME" in caught[0]


def test_a_shim_that_is_a_link_is_refused(cache: Path, tmp_path: Path) -> None:
    path = Path(answer(PRINT_STATUS, XDG_CACHE_HOME=str(cache))[0][0]["path"])
    if cache not in path.parents:
        pytest.skip(reason="a system OpenBLAS comes first here")
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")

    status, _ = answer(PRINT_STATUS, XDG_CACHE_HOME=str(cache))[0]

    assert status["optimized"] is False
    assert "symbolic link" in status["problem"]
    assert "XDG_CACHE_HOME" in status["fix"]


def test_a_shim_that_was_damaged_is_built_again(cache: Path) -> None:
    first, _ = answer(PRINT_STATUS, XDG_CACHE_HOME=str(cache))[0]
    if first["source"] != "scipy-openblas32":
        pytest.skip(reason="a system OpenBLAS comes first here")
    Path(first["path"]).write_bytes(b"half a library")

    assert answer(PRINT_STATUS + CHECK_RESULTS, XDG_CACHE_HOME=str(cache))[0] == [first, []]


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _ = answer(PRINT_STATUS, XDG_CACHE_HOME=str(tmp_path / "file" / "x"))[0]
    if status["source"] == "system":
        pytest.skip(reason="a system OpenBLAS needs no cache")

    assert status["optimized"] is False
    assert "XDG_CACHE_HOME" in status["fix"]


def build_library(path: Path, code: str) -> str:
    """A shared library in C at `path`, for the tests of what else may be on a machine."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip(reason="needs a C compiler")
    path.parent.mkdir(exist_ok=True)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path, "-ldl"],
        input=code,
        text=True,
        check=True,
    )
    return str(path)


@pytest.mark.parametrize(("integers", "taken"), [("", True), ("USE64BITINT", False)])
def test_a_system_openblas_comes_first_unless_its_integers_are_64_bit(
    tmp_path: Path, integers: str, taken: bool
) -> None:
    package = find_spec("scipy_openblas32")
    if package is None or not package.submodule_search_locations:
        pytest.skip(reason="needs scipy-openblas32 to stand behind the system's")
    library = Path(package.submodule_search_locations[0]) / "lib" / "libscipy_openblas.so"
    code = (
        f'#define OPENBLAS "{library}"\n'
        f"{Path(blas.__file__).with_name('blas_shim.c').read_text()}\n"
        f'char *openblas_get_config(void) {{ return "OpenBLAS 0.3.99 {integers} Zen"; }}\n'
    )
    path = build_library(tmp_path / "lib" / "libopenblas.so.0", code)

    (status, _), _ = answer(
        PRINT_STATUS + CHECK_RESULTS + PRINT_WHO_ANSWERS, LD_LIBRARY_PATH=str(tmp_path / "lib")
    )

    assert status["optimized"]
    assert (status["source"] == "system") is taken
    assert (status["path"] == path) is taken
    assert not taken or status["name"] == "OpenBLAS 0.3.99"


def test_a_blas_that_was_loaded_first_is_not_taken_for_an_optimized_one(tmp_path: Path) -> None:
    path = build_library(tmp_path / "lib" / "libblas.so.3", "void cblas_sgemm(void) {}")

    status, caught = answer(PRINT_STATUS, LD_PRELOAD=path)[0]

    assert status["optimized"] is False
    assert "libblas.so.3 was loaded first" in status["problem"]
    assert "LD_PRELOAD" in caught[0]


def test_the_number_of_threads_is_the_users_when_he_has_set_it() -> None:
    code = (
        "import os; from mlops.hardware import ensure_blas; ensure_blas(); "
        "print(os.environ.get('OPENBLAS_NUM_THREADS', 'null'))"
    )
    cores = detect().performance_cores

    assert answer(code, OPENBLAS_NUM_THREADS="3") == [3]
    assert answer(code, OPENBLAS_NUM_THREADS="", OMP_NUM_THREADS="") == [cores]
    assert answer(
        f"import os; os.environ.pop('OPENBLAS_NUM_THREADS', None); {code}", OMP_NUM_THREADS="1"
    ) == [None]


def test_select_device_gives_a_linux_cpu() -> None:
    code = (
        "from mlops.hardware import apply_memory_limits, select_device\n"
        "import json, sys\n"
        "assert 'mlx.core' not in sys.modules\n"
        "print(json.dumps(select_device()))\n"
        "print(json.dumps(apply_memory_limits(True, 1 << 30)))\n"
        "import mlx.core as mx\n"
        "print(mx.set_cache_limit(0))"
    )
    assert answer(code) == ["cpu", {"cache_limit_bytes": 1 << 26}, 1 << 26]
