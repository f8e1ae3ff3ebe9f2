"""`detect` chooses what suits a machine; the Apple settings say what they do on it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from mlops.errors import ConfigError
from mlops.hardware import HardwareInfo
from mlops.serving.bentoml.config import AppleSiliconOptimization, BentoMLConfig, ServingBackend

GIB = 1 << 30

M1 = HardwareInfo(
    system="Darwin",
    machine="arm64",
    chip_type="M1",
    chip_variant=None,
    cpu_name="Apple M1",
    cores=8,
    performance_cores=4,
    memory_bytes=16 * GIB,
    macos_version="15.1",
    is_apple_silicon=True,
    is_rosetta=False,
    is_virtual_machine=False,
    mlx_device="gpu",
    mlx_backend="metal",
    mps_available=True,
    ane_available=True,
    thermal_state="nominal",
)
M2_MAX = replace(M1, chip_type="M2", chip_variant="Max", cores=12, memory_bytes=64 * GIB)
M3_ULTRA = replace(
    M1, chip_type="M3", chip_variant="Ultra", cores=28, performance_cores=20, memory_bytes=96 * GIB
)
M4_SMALL = replace(M1, chip_type="M4", memory_bytes=8 * GIB)
MAC_GUEST = replace(M1, chip_type=None, is_virtual_machine=True, ane_available=False)
LINUX = HardwareInfo(
    system="Linux",
    machine="x86_64",
    chip_type=None,
    chip_variant=None,
    cpu_name="a CPU",
    cores=2,
    performance_cores=2,
    memory_bytes=8 * GIB,
    macos_version=None,
    is_apple_silicon=False,
    is_rosetta=False,
    is_virtual_machine=True,
    mlx_device="cpu",
    mlx_backend="cpu",
    mps_available=False,
    ane_available=False,
    thermal_state="unknown",
)
LINUX_SERVER = replace(LINUX, cores=64, performance_cores=32, memory_bytes=256 * GIB)
LINUX_CUDA = replace(LINUX_SERVER, mlx_device="gpu", mlx_backend="cuda")
UNTOLD = replace(LINUX, memory_bytes=0)


@pytest.mark.parametrize(
    ("hardware", "workers", "max_batch_size", "cpu", "memory_mb"),
    [
        (M1, 1, 16, 4, 8192),
        (M2_MAX, 1, 16, 4, 32768),
        (M3_ULTRA, 2, 32, 10, 24576),
        (M4_SMALL, 1, 16, 4, 4096),
        (MAC_GUEST, 1, 32, 4, 8192),
        (LINUX, 1, 16, 2, 4096),
        (LINUX_SERVER, 2, 32, 16, 65536),
        (LINUX_CUDA, 1, 32, 32, 131072),
        (UNTOLD, 1, 16, 2, None),
    ],
)
def test_detect_suits_the_machine(
    hardware: HardwareInfo, workers: int, max_batch_size: int, cpu: float, memory_mb: int | None
) -> None:
    config = BentoMLConfig.detect("my_project", hardware=hardware, environ={})
    assert config.project_name == "my_project"
    assert config.apple_silicon.chip_type == hardware.chip_type
    assert (config.workers, config.max_batch_size) == (workers, max_batch_size)
    assert (config.cpu_per_worker, config.memory_per_worker_mb) == (cpu, memory_mb)
    assert not [note for note in config.describe_unhonoured(hardware) if "per_worker" in note]


@pytest.mark.parametrize("hardware", [M1, M2_MAX, M3_ULTRA, LINUX])
def test_the_guides_resource_block_runs_on_every_machine(hardware: HardwareInfo) -> None:
    config = BentoMLConfig.detect(project_name="my_project", hardware=hardware, environ={})
    if config.apple_silicon.chip_type in ["M1", "M2"]:
        config.workers = 1
        config.max_batch_size = 16
    elif config.apple_silicon.chip_type == "M3":
        config.workers = 2
        config.max_batch_size = 32
    config.validate()
    assert config.workers == (2 if hardware is M3_ULTRA else 1)


def test_detect_here() -> None:
    config = BentoMLConfig.detect(project_name="my_project")
    assert config.project_name == "my_project"
    assert config.workers >= 1


def test_arguments_and_environment_win_over_the_machine() -> None:
    environ = {
        "MLOPS_WORKERS": "5",
        "MLOPS_MAX_BATCH_SIZE": "4",
        "MLOPS_PROJECT_NAME": "from_environment",
        "MLOPS_APPLE_SILICON__ENABLE_ANE": "true",
    }
    config = BentoMLConfig.detect(hardware=M3_ULTRA, environ=environ, workers=4)
    assert (config.workers, config.max_batch_size) == (4, 4)
    assert config.cpu_per_worker == 5  # the machine's 20 cores among the workers asked for
    assert config.project_name == "from_environment"
    assert config.apple_silicon == AppleSiliconOptimization(enable_ane=True, chip_type="M3")
    assert BentoMLConfig.detect("mine", hardware=M1, environ=environ).project_name == "mine"
    with pytest.raises(ConfigError, match="did you mean 'workers'"):
        BentoMLConfig.detect(hardware=M1, environ={}, worker=2)


def test_core_ml_compute_units() -> None:
    units = {
        (ane, mps): AppleSiliconOptimization(enable_ane=ane, enable_mps=mps).compute_units()
        for ane, mps in product([False, True], repeat=2)
    }
    assert units == {
        (True, True): "ALL",
        (True, False): "CPU_AND_NE",
        (False, True): "CPU_AND_GPU",
        (False, False): "CPU_ONLY",
    }


@pytest.mark.parametrize(
    ("chip_type", "thermal_aware", "thermal_state", "limit"),
    [
        (None, True, "nominal", 64),
        (None, True, "unknown", 64),
        (None, True, "serious", 32),
        (None, True, "critical", 1),
        ("M3", True, "fair", 16),
        ("M3", True, "serious", 8),
        ("M3", True, "critical", 1),
        ("M3", False, "critical", 16),
    ],
)
def test_batch_limit(
    chip_type: str | None, thermal_aware: bool, thermal_state: str, limit: int
) -> None:
    optimization = AppleSiliconOptimization(
        chip_type=chip_type, thermal_aware=thermal_aware, max_batch_size=16
    )
    assert optimization.batch_limit(64, thermal_state) == limit
    assert optimization.batch_limit(1, thermal_state) == 1
    config = BentoMLConfig(max_batch_size=64, apple_silicon=optimization)
    assert config.batch_limit(thermal_state) == limit
    config.enable_apple_silicon_optimization = False
    assert config.batch_limit(thermal_state) == 64


def test_optimization_off_leaves_only_the_choice_of_device() -> None:
    config = BentoMLConfig(
        enable_apple_silicon_optimization=False,
        apple_silicon=AppleSiliconOptimization(enable_mps=False, enable_ane=True, chip_type="M1"),
    )
    assert config.effective_apple_silicon.compute_units() == "CPU_ONLY"
    assert not config.effective_apple_silicon.enable_unified_memory
    assert config.describe_unhonoured(LINUX) == []


def test_mlx_can_be_refused() -> None:
    BentoMLConfig().require_mlx()
    with pytest.raises(ConfigError, match=r"apple_silicon\.enable_mlx"):
        BentoMLConfig(apple_silicon=AppleSiliconOptimization(enable_mlx=False)).require_mlx()


def test_settings_without_effect_here_are_told() -> None:
    config = BentoMLConfig(
        workers=4,
        cpu_per_worker=2,
        memory_per_worker_mb=4096,
        ray_address="auto",
        apple_silicon=AppleSiliconOptimization(enable_ane=True),
    )
    first, *others = config.describe_unhonoured(LINUX)
    assert first.startswith("enable_mps, enable_unified_memory, enable_ane, thermal_aware: ")
    assert [note.partition(":")[0] for note in others] == [
        "cpu_per_worker",
        "memory_per_worker_mb",
        "ray_address",
    ]
    config.serving_backend = ServingBackend.HYBRID
    assert not [note for note in config.describe_unhonoured(LINUX) if "ray" in note]
    assert BentoMLConfig().describe_unhonoured(M3_ULTRA) == []
