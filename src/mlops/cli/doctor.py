"""`mlops doctor`: what this machine is, and each problem with its fix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlops.cli import console
from mlops.cli.arguments import examples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlops.hardware import Diagnosis

EPILOG = examples("mlops doctor", "mlops doctor --json")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Print the facts about this machine, and each problem with its fix.

    Exit status 0 when there is no problem, 1 otherwise.
    """
    from mlops.hardware import diagnose

    diagnosis = diagnose()
    if as_json:
        console.print_json(diagnosis.to_dict())
    else:
        _print(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    # Text, not str: a path may hold what rich would take for markup.
    table = Table.grid(padding=(0, 2))
    for name, value in _facts(diagnosis):
        table.add_row(Text(name, style="bold"), Text(value))
    output = console.output()
    output.print(table)
    output.print()
    if not diagnosis.problems:
        output.print("No problem found.", style="green")
    for problem in diagnosis.problems:
        output.print(f"✗ {problem.what}", style="red")
        output.print(f"  → {problem.fix}")


def _facts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    hardware, blas = diagnosis.hardware, diagnosis.blas
    chip = " ".join(filter(None, (hardware.chip_type, hardware.chip_variant)))
    notes = [
        note
        for note, holds in (
            ("Rosetta", hardware.is_rosetta),
            ("virtual machine", hardware.is_virtual_machine),
        )
        if holds
    ]
    system = f"{hardware.system} {hardware.macos_version or ''}".strip()
    yield "System", ", ".join([f"{system} on {hardware.machine}", *notes])
    yield "Processor", f"{hardware.cpu_name} (Apple {chip})" if chip else hardware.cpu_name
    yield "Cores", f"{hardware.cores}, of which {hardware.performance_cores} fast or physical"
    yield "Memory", _gib(hardware.memory_bytes) if hardware.memory_bytes else "unknown"
    yield "Thermal state", hardware.thermal_state
    yield (
        "MLX computes on",
        f"{hardware.mlx_device or 'nothing'} ({hardware.mlx_backend or 'none'})",
    )
    yield "BLAS", blas.name if blas.source != "not needed" else "not needed"
    yield "PyTorch MPS", "yes" if hardware.mps_available else "no"
    yield "Neural Engine", "yes" if hardware.ane_available else "no"
    yield "Store", f"{diagnosis.store} ({_gib(diagnosis.free_disk_bytes)} free)"
    for library, version in diagnosis.versions.items():
        yield library, version or "not installed"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
