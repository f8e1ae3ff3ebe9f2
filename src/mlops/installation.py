"""How a library is added to the Python that this toolkit runs in.

What to install stands in the toolkit's own metadata. No index has to know the toolkit itself: it
may come from a clone or from a wheel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

DISTRIBUTION = "mlx-mlops"


def install_command(library: str, extra: str = "", *, again: bool = False) -> str:
    """The shell command that installs a library here, in the versions that the toolkit works with.

    Args:
        library: a requirement of the toolkit, or any other.
        extra: the extra of the toolkit that brings it; "" when none does.
        again: install it even when it seems to be there.
    """
    wanted = " ".join(map(shlex.quote, requirements(library, extra)))
    if importlib.util.find_spec("pip"):
        options = "--force-reinstall --no-deps " if again else ""
        return f"{shlex.quote(sys.executable)} -m pip install {options}{wanted}"
    options = f"--reinstall-package {library} " if again else ""
    return f"{_uv()} pip install --python {shlex.quote(sys.executable)} {options}{wanted}"


def requirements(library: str, extra: str = "") -> list[str]:
    """What the toolkit requires: of this library, or for an extra; the library itself if nothing.

    Each is one requirement, such as `ray[serve]<3,>=2.60`, that holds on this platform.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    try:
        declared = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ())
        name = canonicalize_name(Requirement(library).name)
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement):
        return [library]
    found = []
    for requirement in declared:
        is_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        is_wanted = is_extra if extra else canonicalize_name(requirement.name) == name
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if is_wanted and holds and is_extra == bool(extra):
            requirement.marker = None
            found.append(str(requirement))
    return found or [library]


def callers_path() -> str:
    """The PATH of the user's shell; `make` has another, and keeps that in CALLER_PATH."""
    return os.environ.get("CALLER_PATH") or os.environ.get("PATH", "")


def _uv() -> str:
    """Environments without pip were made by uv: it is on PATH, or in a clone's `.tools`."""
    in_clone = Path(sys.prefix).parent / ".tools" / "bin" / "uv"
    if shutil.which("uv", path=callers_path()) is None and in_clone.exists():
        return shlex.quote(str(in_clone))
    return "uv"
