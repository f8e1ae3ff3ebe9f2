"""What `mlops doctor` tells: the facts about this machine, and each problem with its fix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlops.hardware.blas import BlasStatus, find_blas
from mlops.hardware.home import expand
from mlops.hardware.machine import HardwareInfo, detect
from mlops.hardware.probes import Probes
from mlops.installation import install_command

LIBRARIES = ("mlx-mlops", "mlx", "mlx-lm", "bentoml", "mlflow", "numpy", "ray")
NEEDED_LIBRARIES = ("mlx", "mlx-lm", "bentoml")
SAFE_BENTOML = "1.4.39"
MLX_MIN_MACOS = 14
LOW_MEMORY_BYTES = 4 << 30
LOW_DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and one sentence on what to do about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Diagnosis:
    """All that `mlops doctor` knows."""

    hardware: HardwareInfo
    blas: BlasStatus
    versions: dict[str, str | None]
    """By distribution; None when it is not installed."""
    store: str
    """BentoML's home, where packages are kept."""
    free_disk_bytes: int
    """Where the store is, or is going to be."""
    problems: list[Problem]

    def to_dict(self) -> dict[str, Any]:
        """The same in JSON types."""
        return asdict(self)


def diagnose(probes: Probes | None = None) -> Diagnosis:
    """Look at the machine, the libraries and the store, and list what is wrong."""
    hardware = detect(probes)
    probes = probes or Probes()
    store = expand(os.path.expandvars(os.environ.get("BENTOML_HOME") or "~/bentoml")).absolute()
    blas = find_blas(hardware)
    versions = {name: probes.version(name) for name in LIBRARIES}
    free_disk_bytes = probes.free_disk_bytes(str(store))
    return Diagnosis(
        hardware=hardware,
        blas=blas,
        versions=versions,
        store=str(store),
        free_disk_bytes=free_disk_bytes,
        problems=[
            *_machine_problems(hardware),
            *_library_problems(hardware, versions),
            *([Problem(blas.problem, blas.fix or "")] if blas.problem else []),
            *_store_problems(store, free_disk_bytes),
        ],
    )


def _machine_problems(hardware: HardwareInfo) -> Iterator[Problem]:
    if hardware.is_rosetta:
        yield Problem(
            "This Python is an x86-64 one under Rosetta, for which MLX does not exist.",
            "Install an arm64 Python and make the environment again with it.",
        )
    elif hardware.system == "Darwin" and not hardware.is_apple_silicon:
        yield Problem(
            "MLX does not exist for Macs with an Intel processor.",
            "Use a Mac with Apple silicon, or a Linux machine.",
        )
    major = int((hardware.macos_version or "0").partition(".")[0] or 0)
    if 0 < major < MLX_MIN_MACOS:
        yield Problem(
            f"macOS {hardware.macos_version} is too old for MLX.",
            f"Update to macOS {MLX_MIN_MACOS} or later.",
        )
    if 0 < hardware.memory_bytes < LOW_MEMORY_BYTES:
        yield Problem(
            f"There is only {hardware.memory_bytes / 2**30:.1f} GiB of memory.",
            f"Use a machine, or a container limit, of {LOW_MEMORY_BYTES >> 30} GiB or more, "
            "or serve very small models only.",
        )
    if hardware.thermal_state in {"serious", "critical"}:
        yield Problem(
            f"The machine is hot (thermal state {hardware.thermal_state}), so it runs slower.",
            "Let it cool down, and see to its ventilation.",
        )


def _library_problems(hardware: HardwareInfo, versions: dict[str, str | None]) -> Iterator[Problem]:
    from packaging.version import Version

    can_have_mlx = hardware.system != "Darwin" or hardware.machine == "arm64"
    for name in NEEDED_LIBRARIES:
        if versions[name] is None and (can_have_mlx or not name.startswith("mlx")):
            yield Problem(f"{name} is not installed.", f"Install it with: {install_command(name)}")
    if versions["mlx"] is not None and hardware.mlx_backend is None and can_have_mlx:
        yield Problem(
            "MLX is installed without a backend, so it cannot be imported.",
            f"Install one with: {install_command('mlx')} (for an NVIDIA GPU: 'mlx[cuda13]').",
        )
    bentoml = versions["bentoml"]
    if bentoml is not None and Version(bentoml) < Version(SAFE_BENTOML):
        yield Problem(
            f"BentoML {bentoml} has known security holes.",
            f"Update it with: {install_command('bentoml')}",
        )


def _store_problems(store: Path, free_disk_bytes: int) -> Iterator[Problem]:
    nearest = next(path for path in (store, *store.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield Problem(
            f"The store {store} cannot be written.",
            "Set BENTOML_HOME to a folder of yours that can be written.",
        )
    if free_disk_bytes < LOW_DISK_BYTES:
        yield Problem(
            f"Only {free_disk_bytes / 2**30:.1f} GiB of disk are free for the store {store}.",
            "Delete models that you no longer need, or set BENTOML_HOME to a larger disk.",
        )
