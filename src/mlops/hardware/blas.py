"""An optimized BLAS for MLX on a Linux CPU, in place before `mlx.core` is first imported.

MLX's CPU wheel is linked against the reference BLAS, 10 or more times slower than OpenBLAS. Names
that are in the process's global scope win over those of the wheel's own library, so opening an
OpenBLAS with `RTLD_GLOBAL` first is all it takes; once MLX has bound its symbols it is too late.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlops.hardware.machine import HardwareInfo, detect
from mlops.hardware.probes import find_version
from mlops.installation import install_command

BlasSource = Literal["system", "scipy-openblas32", "accelerate", "reference", "not needed"]

COMPILE_TIMEOUT_S = 120
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
SLOW_DOWN = "matrix products take 10 or more times longer than they need to"


class BlasWarning(RuntimeWarning):
    """MLX computes with the slow reference BLAS; the message says why and what to do."""


@dataclass(frozen=True)
class BlasStatus:
    """Which BLAS answers MLX's calls in this process."""

    name: str
    path: str | None
    """The library that answers, or is to; None when it is MLX's own or not known."""
    source: BlasSource
    optimized: bool
    """False only when MLX computes with the slow reference BLAS."""
    problem: str | None = None
    """One sentence, or None when all is well."""
    fix: str | None = None
    """What to do about `problem`."""


class _UnavailableError(Exception):
    """An optimized BLAS cannot be had this way; carries what to do about it."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


_lock = threading.Lock()
_status: BlasStatus | None = None


def ensure_blas() -> BlasStatus:
    """Put an optimized BLAS in place for MLX; call it before `mlx.core` is first imported.

    Does its work once a process and never raises. When there is no optimized BLAS to be had, or
    MLX was imported too early, it warns once with a `BlasWarning` that names the fix.
    """
    global _status  # noqa: PLW0603
    with _lock:
        if _status is not None:
            return _status
        _status = _place_blas()
    if not _status.optimized and _status.problem:
        warnings.warn(f"{_status.problem} {_status.fix}", BlasWarning, stacklevel=2)
    return _status


def find_blas(hardware: HardwareInfo | None = None) -> BlasStatus:
    """Say which BLAS `ensure_blas` would put in place, compiling the shim if that is needed.

    Changes nothing for MLX in this process, so it can be asked at any time. Never raises.
    """
    elsewhere = _status_off_linux_cpu(hardware or detect())
    if elsewhere is not None:
        return elsewhere
    try:
        return _find_system_openblas() or _find_scipy_openblas()
    except _UnavailableError as unavailable:
        return BlasStatus(
            name="reference BLAS",
            path=None,
            source="reference",
            optimized=False,
            problem=f"MLX computes with the reference BLAS ({unavailable}), so {SLOW_DOWN}.",
            fix=unavailable.fix,
        )


def thread_environment() -> dict[str, str]:
    """The thread variables to set: none when the user has chosen, else one thread per core.

    Two threads of one core share its arithmetic units, so hyper-threads would only get in the way.
    """
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return {}
    return {"OPENBLAS_NUM_THREADS": str(detect().performance_cores)}


def _place_blas() -> BlasStatus:
    already = _status_off_linux_cpu(detect()) or _find_preloaded_blas()
    if already is not None:
        return already
    if "mlx.core" in sys.modules:
        return BlasStatus(
            name="reference BLAS",
            path=None,
            source="reference",
            optimized=False,
            problem="mlx.core was imported before mlops could put an optimized BLAS in its place, "
            f"so {SLOW_DOWN}.",
            fix="Call mlops.hardware.ensure_blas() before the first import of mlx.core, or start "
            "the program with: mlops run -- COMMAND",
        )
    os.environ.update(thread_environment())  # OpenBLAS reads them when it is opened
    status = find_blas()
    if status.path is None:
        return status
    library = ctypes.CDLL(status.path, mode=ctypes.RTLD_GLOBAL)
    first = _path_of_symbol(ctypes.CDLL(None), "cblas_sgemm")
    if first == _path_of_symbol(library, "cblas_sgemm"):
        return status
    return BlasStatus(
        name=Path(first or "unknown BLAS").name,
        path=first,
        source="reference",
        optimized=False,
        problem=f"{first} was loaded first and answers MLX's calls; if it is a reference BLAS, "
        f"{SLOW_DOWN}.",
        fix="Take it out of LD_PRELOAD, or call mlops.hardware.ensure_blas() before it is loaded.",
    )


def _status_off_linux_cpu(hardware: HardwareInfo) -> BlasStatus | None:
    """The answer where MLX brings a good BLAS or has no use for one; None on a Linux CPU."""
    if hardware.system == "Darwin":
        return BlasStatus("Accelerate", None, "accelerate", optimized=True)
    if hardware.system == "Linux" and hardware.mlx_backend == "cpu":
        return None
    return BlasStatus("none", None, "not needed", optimized=True)


def _find_preloaded_blas() -> BlasStatus | None:
    """The optimized BLAS that is in the global scope already, as `mlops run` leaves it."""
    path = _path_of_symbol(ctypes.CDLL(None), "cblas_sgemm")
    if path is None:
        return None
    name = Path(path).name
    if name == _SHIM_NAME:
        return BlasStatus(_scipy_name(), path, "scipy-openblas32", optimized=True)
    # The folder counts: Debian's OpenBLAS may be openblas-pthread/libblas.so.3.
    family = "/".join(Path(path).resolve().parts[-2:])
    if any(word in family for word in ("openblas", "mkl", "blis", "armpl")):
        return BlasStatus(name, path, "system", optimized=True)
    return None


def _find_system_openblas() -> BlasStatus | None:
    try:
        library = ctypes.CDLL("libopenblas.so.0", mode=os.RTLD_LOCAL)
    except OSError:
        return None
    path = _path_of_symbol(library, "cblas_sgemm")
    if path is None or not hasattr(library, "openblas_get_config"):
        return None
    library.openblas_get_config.restype = ctypes.c_char_p
    config = library.openblas_get_config().decode(errors="replace")
    # With 64-bit integers its LAPACK would read past the 32-bit ones that MLX passes.
    if "USE64BITINT" in config or not _computes_right(library):
        return None
    return BlasStatus(" ".join(config.split()[:2]), path, "system", optimized=True)


_SHIM_NAME = "libmlxblas.so"


def _scipy_name() -> str:
    return f"OpenBLAS (scipy-openblas32 {find_version('scipy-openblas32')})"


def _find_scipy_openblas() -> BlasStatus:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        raise _UnavailableError(
            "no OpenBLAS is installed",
            f"Install your system's libopenblas0, or: {install_command('scipy-openblas32')}",
        )
    openblas = Path(spec.submodule_search_locations[0]) / "lib" / "libscipy_openblas.so"
    try:
        shim = _find_or_compile_shim(openblas)
        library = ctypes.CDLL(str(shim), mode=os.RTLD_LOCAL)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        raise _UnavailableError(
            f"the shim for it cannot be kept in the cache: {error}",
            "Set XDG_CACHE_HOME to a folder of yours that can be written, or install your "
            "system's libopenblas0.",
        ) from error
    if not _computes_right(library):
        raise _UnavailableError(
            f"{openblas} gives wrong results",
            f"Install it again with: {install_command('scipy-openblas32', again=True)}",
        )
    return BlasStatus(_scipy_name(), str(shim), "scipy-openblas32", optimized=True)


def _find_or_compile_shim(openblas: Path) -> Path:
    """The path of the shim for this library, compiled into the user's cache when it is not there.

    Raises:
        OSError: the cache cannot be written, or is not this user's alone.
    """
    if not _can_open(openblas):
        raise _UnavailableError(
            f"{openblas} is missing or cannot be opened",
            f"Install it again with: {install_command('scipy-openblas32', again=True)}",
        )
    escaped = "".join(f"\\{byte:03o}" for byte in os.fsencode(openblas))
    source = f'#define OPENBLAS "{escaped}"\n' + Path(__file__).with_name("blas_shim.c").read_text()
    parts = (source, find_version("scipy-openblas32") or "", platform.machine())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = _private_folder("mlx-mlops", "blas", key)
    shim = folder / _SHIM_NAME
    if os.path.lexists(shim):
        _require_private(shim)
    if not _can_open(shim):  # missing, or cut short by a crash
        _compile(source, shim)
    return shim


def _can_open(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
    except OSError:
        return False
    return True


def _private_folder(*names: str) -> Path:
    """A folder in the user's cache that nobody else can write, made where it is missing."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder /= name
        folder.mkdir(mode=0o700, exist_ok=True)
        _require_private(folder)
    return folder


def _require_private(path: Path) -> None:
    """Refuse what another user could have put there: it is about to run in this process."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path} is a symbolic link")
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path} belongs to, or can be written by, another user")


def _compile(source: str, shim: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise _UnavailableError(
            "there is no C compiler to build its shim with",
            "Install one (Debian: apt install gcc) or your system's OpenBLAS "
            "(Debian: apt install libopenblas0-pthread).",
        )
    handle, draft = tempfile.mkstemp(dir=shim.parent, suffix=".so")
    os.close(handle)
    try:
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", draft, "-ldl"],
            input=source.encode(),
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
            check=True,
        )
        Path(draft).chmod(0o700)
        Path(draft).replace(shim)  # atomic: whoever races here leaves a whole file
    except subprocess.SubprocessError as error:
        output = getattr(error, "stderr", None) or b""
        last = output.decode(errors="replace").strip().splitlines()[-1:]
        raise _UnavailableError(
            f"{compiler} cannot build its shim: {last[0] if last else error}",
            "Install a working C compiler with its headers (Debian: apt install gcc libc6-dev) or "
            "your system's OpenBLAS (Debian: apt install libopenblas0-pthread).",
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(draft).unlink()


def _computes_right(library: ctypes.CDLL) -> bool:
    """Multiply two small float32 matrices through the C interface, and check the product."""
    row_major, no_transpose = 101, 111
    matrix = ctypes.c_float * 4
    a, b, product = matrix(1, 2, 3, 4), matrix(5, 6, 7, 8), matrix()
    library.cblas_sgemm(
        *(row_major, no_transpose, no_transpose, 2, 2, 2),
        *(ctypes.c_float(1), a, 2, b, 2, ctypes.c_float(0), product, 2),
    )
    return list(product) == [19, 22, 43, 50]


class _SymbolInfo(ctypes.Structure):
    _fields_ = [
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _path_of_symbol(library: ctypes.CDLL, symbol: str) -> str | None:
    """The file that `symbol` comes from when it is looked up in `library`; None when not found."""
    try:
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p)
    except AttributeError:
        return None
    info = _SymbolInfo()
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(info)) or info.path is None:
        return None
    return os.fsdecode(info.path)
