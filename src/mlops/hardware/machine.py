"""What this machine is: chip, cores, memory, the device MLX computes on, and how hot it is.

Nothing here imports MLX: the backend is read from the installed distributions, so it is known
before `blas.ensure_blas` has to act.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from mlops.hardware.probes import Probes

MLXBackend = Literal["metal", "cuda", "cpu"]
ThermalState = Literal["nominal", "fair", "serious", "critical", "unknown"]

THERMAL_LEVELS: tuple[ThermalState, ...] = ("nominal", "fair", "serious", "critical")
"""In the order of `NSProcessInfo.thermalState`."""

FAIR_MARGIN_MILLIDEGREES = 10_000
"""Linux: this close below the temperature at which the kernel throttles counts as "fair"."""


@dataclass(frozen=True)
class HardwareInfo:
    """The facts about one machine."""

    system: str
    """"Darwin", "Linux", …"""
    machine: str
    """The architecture of this Python: "arm64", "aarch64", "x86_64", …"""
    chip_type: str | None
    """"M1", "M2", …; None when the chip is not Apple's or, as in a virtual machine, not told."""
    chip_variant: str | None
    """"Pro", "Max", "Ultra", or None for the plain chip."""
    cpu_name: str
    cores: int
    """Logical cores this process may use; a container's CPU quota counts."""
    performance_cores: int
    """Apple: cores of the fast kind. Elsewhere: physical cores, hyper-threads not counted."""
    memory_bytes: int
    """Physical memory, or the container's limit when that is lower; 0 when unknown."""
    macos_version: str | None
    is_apple_silicon: bool
    is_rosetta: bool
    """An x86-64 Python translated on Apple silicon; MLX has no wheel for it."""
    is_virtual_machine: bool
    mlx_device: Literal["gpu", "cpu"] | None
    mlx_backend: MLXBackend | None
    """None when MLX, or its backend for this machine, is not installed."""
    mps_available: bool
    """PyTorch can use Metal Performance Shaders here."""
    ane_available: bool
    """Core ML can use the Apple Neural Engine here."""
    thermal_state: ThermalState
    """As it was at the time of detection; `thermal_state()` says how it is at the moment."""


def detect(probes: Probes | None = None) -> HardwareInfo:
    """Say what this machine is. Without `probes` the answer is found once and kept."""
    return _detect(probes) if probes is not None else _detect_here()


def thermal_state(probes: Probes | None = None) -> ThermalState:
    """Say how hot the machine is now; "unknown" when it does not tell."""
    probes = probes or Probes()
    system = probes.system()
    if system == "Darwin":
        return _mac_thermal_state(probes)
    return _linux_thermal_state(probes) if system == "Linux" else "unknown"


@functools.cache
def _detect_here() -> HardwareInfo:
    return _detect(Probes())


def _detect(probes: Probes) -> HardwareInfo:
    return _detect_mac(probes) if probes.system() == "Darwin" else _detect_other(probes)


def _detect_mac(probes: Probes) -> HardwareInfo:
    machine = probes.machine()
    brand = probes.sysctl("machdep.cpu.brand_string") or ""
    is_rosetta = probes.sysctl("sysctl.proc_translated") == "1"
    is_apple_silicon = machine == "arm64" or is_rosetta
    is_virtual_machine = probes.sysctl("kern.hv_vmm_present") == "1"
    version = probes.mac_version()
    chip = re.match(r"Apple (M\d+)(?: (Pro|Max|Ultra))?\b", brand)
    cores = probes.usable_cores()
    fast_cores = probes.sysctl("hw.perflevel0.physicalcpu") or probes.sysctl("hw.physicalcpu")
    has_metal = is_apple_silicon and not is_rosetta and probes.version("mlx-metal") is not None
    return HardwareInfo(
        system="Darwin",
        machine=machine,
        chip_type=chip[1] if chip else None,
        chip_variant=chip[2] if chip else None,
        cpu_name=brand or machine,
        cores=cores,
        performance_cores=_to_int(fast_cores) or cores,
        memory_bytes=_to_int(probes.sysctl("hw.memsize")),
        macos_version=version or None,
        is_apple_silicon=is_apple_silicon,
        is_rosetta=is_rosetta,
        is_virtual_machine=is_virtual_machine,
        mlx_device="gpu" if has_metal else None,
        mlx_backend="metal" if has_metal else None,
        mps_available=is_apple_silicon and not is_rosetta and _as_tuple(version) >= (12, 3),
        ane_available=is_apple_silicon and not is_virtual_machine,  # a guest does not see it
        thermal_state=thermal_state(probes),
    )


def _detect_other(probes: Probes) -> HardwareInfo:
    machine = probes.machine()
    cpuinfo = probes.read_file("/proc/cpuinfo") or ""
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    cores = _cores_within_quota(probes)
    backend = _find_linux_backend(probes)
    return HardwareInfo(
        system=probes.system(),
        machine=machine,
        chip_type=None,
        chip_variant=None,
        cpu_name=name[1].strip() if name else machine,
        cores=cores,
        performance_cores=min(cores, _count_physical_cores(probes) or cores),
        memory_bytes=_memory_within_limit(probes),
        macos_version=None,
        is_apple_silicon=False,
        is_rosetta=False,
        is_virtual_machine=re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE)
        is not None,
        mlx_device=None if backend is None else ("cpu" if backend == "cpu" else "gpu"),
        mlx_backend=backend,
        mps_available=False,
        ane_available=False,
        thermal_state=thermal_state(probes),
    )


def _find_linux_backend(probes: Probes) -> MLXBackend | None:
    has_cuda_wheel = any(probes.version(f"mlx-cuda-{major}") for major in (12, 13))
    has_gpu = probes.list_paths("/dev/nvidia[0-9]*") or probes.list_paths("/dev/dxg")  # dxg: WSL
    if has_cuda_wheel:
        return "cuda" if has_gpu else "cpu"
    return "cpu" if probes.version("mlx-cpu") else None


def _count_physical_cores(probes: Probes) -> int:
    """The number of distinct cores that the kernel lists, or 0 when it lists none."""
    paths = probes.list_paths("/sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")
    return len({probes.read_file(path) for path in paths})


def _cores_within_quota(probes: Probes) -> int:
    """Usable cores, no more than a control group's CPU quota (`cpu.max`: "quota period" in µs)."""
    cores = probes.usable_cores()
    quota, _, period = (probes.read_file("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if not (quota.isdecimal() and _to_int(period)):
        return cores
    return max(1, min(cores, int(quota) // int(period)))


def _memory_within_limit(probes: Probes) -> int:
    total = re.search(r"^MemTotal:\s*(\d+) kB", probes.read_file("/proc/meminfo") or "", re.M)
    known = (
        int(total[1]) * 1024 if total else 0,
        _to_int(probes.read_file("/sys/fs/cgroup/memory.max")),
    )
    return min((size for size in known if size), default=0)


def _mac_thermal_state(probes: Probes) -> ThermalState:
    level = probes.thermal_level()
    if level is not None:
        return THERMAL_LEVELS[min(max(level, 0), 3)]
    report = probes.run(["/usr/bin/pmset", "-g", "therm"])
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", report or "")
    if limit is None:
        return "nominal" if report and "No thermal warning" in report else "unknown"
    percent = int(limit[1])
    if percent >= 100:
        return "nominal"
    return "fair" if percent >= 80 else "serious" if percent >= 50 else "critical"


def _linux_thermal_state(probes: Probes) -> ThermalState:
    """The hottest zone, measured against its own trip points (millidegrees Celsius)."""
    levels = [
        level
        for zone in probes.list_paths("/sys/class/thermal/thermal_zone*")
        if (level := _zone_level(probes, zone)) is not None
    ]
    return THERMAL_LEVELS[max(levels)] if levels else "unknown"


def _zone_level(probes: Probes, zone: str) -> int | None:
    temperature = _to_int(probes.read_file(f"{zone}/temp"))
    trips: dict[str, int] = {}
    for path in probes.list_paths(f"{zone}/trip_point_*_type"):
        kind = probes.read_file(path)
        trip = _to_int(probes.read_file(str(PurePosixPath(path)).removesuffix("type") + "temp"))
        if kind in {"passive", "hot", "critical"} and trip > 0:
            trips[kind] = min(trip, trips.get(kind, trip))
    if temperature <= 0 or not trips:
        return None
    if temperature >= trips.get("hot", trips.get("critical", temperature + 1)):
        return 3
    throttles_at = trips.get("passive", min(trips.values()))
    if temperature >= throttles_at:
        return 2
    return 1 if temperature >= throttles_at - FAIR_MARGIN_MILLIDEGREES else 0


def _to_int(text: str | None) -> int:
    """The whole number that `text` is, or 0."""
    return int(text) if text and text.strip().isdecimal() else 0


def _as_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
