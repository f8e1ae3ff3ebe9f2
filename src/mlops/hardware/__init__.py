"""What this machine is and how to get the most of it: chip, memory, heat, MLX device and BLAS.

The only package that asks the operating system about the hardware or touches a BLAS. It imports
nothing of this toolkit but `errors`, and MLX only inside the functions that set it up.
"""

from mlops.hardware.blas import BlasStatus, BlasWarning, ensure_blas, find_blas
from mlops.hardware.device import apply_memory_limits, select_device
from mlops.hardware.diagnosis import Diagnosis, Problem, diagnose
from mlops.hardware.launch import launch_environment
from mlops.hardware.machine import HardwareInfo, ThermalState, detect, thermal_state
from mlops.hardware.probes import Probes

__all__ = [
    "BlasStatus",
    "BlasWarning",
    "Diagnosis",
    "HardwareInfo",
    "Probes",
    "Problem",
    "ThermalState",
    "apply_memory_limits",
    "detect",
    "diagnose",
    "ensure_blas",
    "find_blas",
    "launch_environment",
    "select_device",
    "thermal_state",
]
