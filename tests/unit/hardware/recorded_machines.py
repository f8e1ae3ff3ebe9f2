"""What the probes answer on twelve machines, so that each can be tested on any."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from mlops.hardware import Probes

MACHINES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("machines.json").read_text()
)


def probes_of(name: str, **changes: Any) -> Probes:
    """The recorded machine's probes; `changes` replace single answers, such as `versions`."""
    answers = {**MACHINES[name]["answers"], **changes}
    files: dict[str, str] = answers.get("files", {})
    folders = {str(parent) for path in files for parent in Path(path).parents}
    return Probes(
        system=lambda: answers["system"],
        machine=lambda: answers["machine"],
        mac_version=lambda: answers.get("mac_version", ""),
        sysctl=lambda key: answers.get("sysctl", {}).get(key),
        run=lambda command: answers.get("commands", {}).get(" ".join(command)),
        read_file=files.get,
        list_paths=lambda pattern: sorted(fnmatch.filter({*files, *folders}, pattern)),
        usable_cores=lambda: answers["usable_cores"],
        thermal_level=lambda: answers.get("thermal_level"),
        version=answers["versions"].get,
        free_disk_bytes=lambda path: answers.get("free_disk_bytes", 100 << 30),
    )
