"""Each recorded machine is seen for what it is."""

from __future__ import annotations

import pytest
from recorded_machines import MACHINES, probes_of

from mlops.hardware import detect, thermal_state


@pytest.mark.parametrize("name", MACHINES)
def test_a_recorded_machine_is_seen_for_what_it_is(name: str) -> None:
    hardware = detect(probes_of(name))

    expected = MACHINES[name]["expected"]
    assert {field: getattr(hardware, field) for field in expected} == expected


def test_this_machine_is_detected_once() -> None:
    hardware = detect()

    assert hardware.cores >= hardware.performance_cores >= 1
    assert hardware.memory_bytes > 0
    assert detect() is hardware


def test_a_machine_that_tells_nothing_is_no_error() -> None:
    for system in ("Linux", "Darwin", "Windows"):
        probes = probes_of(
            "M1", system=system, sysctl={}, mac_version="", versions={}, thermal_level=None
        )
        hardware = detect(probes)
        assert (hardware.chip_type, hardware.mlx_device) == (None, None)
        assert hardware.memory_bytes == 0
        assert hardware.thermal_state == "unknown"


def test_the_cuda_wheel_without_a_gpu_computes_on_the_cpu() -> None:
    hardware = detect(probes_of("Linux CUDA", files={}))

    assert (hardware.mlx_device, hardware.mlx_backend) == ("cpu", "cpu")


def test_old_rosetta_hides_the_chip_but_not_that_it_is_apples() -> None:
    sysctl = {
        "machdep.cpu.brand_string": "VirtualApple @ 2.50GHz processor",
        "sysctl.proc_translated": "1",
    }
    hardware = detect(probes_of("Rosetta", sysctl=sysctl))

    assert hardware.is_apple_silicon
    assert hardware.chip_type is None


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 16), ("400000 100000", 4), ("50000 100000", 1), ("3200000 100000", 16)],
)
def test_a_containers_cpu_quota_limits_the_cores(quota: str, cores: int) -> None:
    files = MACHINES["Linux x86-64"]["answers"]["files"]
    hardware = detect(probes_of("Linux x86-64", files={**files, "/sys/fs/cgroup/cpu.max": quota}))

    assert hardware.cores == cores
    assert hardware.performance_cores == min(cores, 8)


@pytest.mark.parametrize(
    ("temperature", "state"),
    [
        ("47500", "nominal"),
        ("84999", "nominal"),
        ("85000", "fair"),
        ("95000", "serious"),
        ("100000", "critical"),
        ("-274000", "unknown"),
        ("none", "unknown"),
    ],
)
def test_linux_heat_is_measured_against_the_trip_points(temperature: str, state: str) -> None:
    files = MACHINES["Linux x86-64"]["answers"]["files"]
    probes = probes_of(
        "Linux x86-64", files={**files, "/sys/class/thermal/thermal_zone0/temp": temperature}
    )

    assert thermal_state(probes) == state


@pytest.mark.parametrize(
    ("limit", "state"), [(100, "nominal"), (85, "fair"), (50, "serious"), (20, "critical")]
)
def test_an_older_mac_tells_its_heat_by_the_speed_limit(limit: int, state: str) -> None:
    report = f"\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= {limit}"
    probes = probes_of("Intel Mac", commands={"/usr/bin/pmset -g therm": report})

    assert thermal_state(probes) == state
