"""Adapters that come and go while the service runs, with the bodies and answers of vLLM.

    POST /v1/load_lora_adapter     {"lora_name", "lora_path", "load_inplace"}
    POST /v1/unload_lora_adapter   {"lora_name"}

Off unless the operator turns it on. An adapter comes from the model store, by tag, or from below
one folder; from nowhere else, and nothing is downloaded. The runner verifies it, checks that it
fits the base model and loads it, in a thread, one change after the other. What has changed is kept
for a worker that takes this one's place, where the server starts one (`kept_adapters`).
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from mlops.engine import BASE_NAME
from mlops.errors import (
    AdapterNotFoundError,
    EngineShutdownError,
    InvalidRequestError,
    MLOpsError,
    PackagingError,
)
from mlops.serving.http.schemas import LoadLoraAdapterBody, UnloadLoraAdapterBody, parse
from mlops.serving.http.served import Served, ServiceInfo
from mlops.serving.http.waiting import disconnection
from mlops.serving.runner.base import AdapterRunner, Runner

MAX_NAME_CHARACTERS = 128
MAX_PATH_CHARACTERS = 1024
MAX_ADAPTERS = 4096

_FOLDERS = re.compile(r"(?<![^\s'\"(])(?:/[^\s/:;,'\"]+)+/([^\s/:;,'\"]+)")
"""An absolute path; what is told to clients is its last part."""


async def post_load_lora_adapter(
    served: Served, request: Request, body: dict[str, Any]
) -> Response:
    """Serve another adapter."""
    _check_enabled(served)
    asked = parse(LoadLoraAdapterBody, body)
    name, path, replaces = asked.lora_name, asked.lora_path, bool(asked.load_inplace)
    check_name(name, served.info)
    folder, kept = served.settings.adapter_folder, served.kept_adapters

    def load(runner: AdapterRunner) -> None:
        names = runner.adapter_names
        if name in names and not replaces:
            raise InvalidRequestError(
                f"The lora adapter {name!r} has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to true.",
                "lora_name",
            )
        if name not in names and len(names) >= MAX_ADAPTERS:
            raise InvalidRequestError(f"there are {MAX_ADAPTERS} adapters, which is the limit")
        try:
            found = find_adapter(path, folder)
            adapter = kept and kept.adapter_at(found)
            runner.add_adapter(name, found, replace=replaces)
        except (InvalidRequestError, EngineShutdownError):
            raise
        except MLOpsError as exc:  # it is missing, damaged or does not fit: the request is wrong
            reason = without_folders(str(exc))
            raise InvalidRequestError(f"lora_path {path!r}: {reason}", "lora_path") from exc
        if kept and adapter:
            kept.loaded(name, adapter)

    await _change(served, request, load)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def post_unload_lora_adapter(
    served: Served, request: Request, body: dict[str, Any]
) -> Response:
    """Serve an adapter no more; requests under way finish with it."""
    _check_enabled(served)
    name, kept = parse(UnloadLoraAdapterBody, body).lora_name, served.kept_adapters

    def unload(runner: AdapterRunner) -> None:
        if not (kept and name in kept.missing):
            runner.remove_adapter(name)
        if kept:
            kept.unloaded(name)

    try:
        await _change(served, request, unload)
    except AdapterNotFoundError as exc:
        raise HTTPException(404, f"The lora adapter {name[:128]!r} cannot be found.") from exc
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def without_folders(text: str) -> str:
    """What a client may read of an error: paths of this machine as their last parts."""
    return _FOLDERS.sub(r"\1", text)


def check_name(name: str, info: ServiceInfo) -> None:
    """Refuse a name that requests could not use, or that means something else already.

    Raises:
        InvalidRequestError: says what is allowed.
    """
    taken = (BASE_NAME, *info.model_names)
    if not name.isprintable() or name != name.strip() or len(name) > MAX_NAME_CHARACTERS:
        raise InvalidRequestError(
            f"lora_name must be 1 to {MAX_NAME_CHARACTERS} printable characters without spaces "
            f"around them, not {name[:MAX_NAME_CHARACTERS]!r}",
            "lora_name",
        )
    if name in taken or any(name.startswith(f"{one}:") for one in taken):
        raise InvalidRequestError(
            f"lora_name {name!r} is, or begins with, a name of the base model", "lora_name"
        )


def find_adapter(path: str, folder: Path | None) -> str | Path:
    """Where an adapter is, as the registry takes it; reads the file system.

    Args:
        path: as a client said it.
        folder: what clients may load from, besides the model store.

    Returns:
        A folder below `folder`, links resolved; or a tag of the store with its digest, which is no
        name of a file or of anything to be downloaded.

    Raises:
        InvalidRequestError: it is neither.
        IntegrityError: the store's entry is damaged.
    """
    if len(path) > MAX_PATH_CHARACTERS or not path.isprintable():
        raise InvalidRequestError(
            f"lora_path must be 1 to {MAX_PATH_CHARACTERS} printable characters", "lora_path"
        )
    if folder is not None and (found := _find_below(folder, path)):
        return found
    from mlops.registry import ModelStore
    from mlops.registry.references import split_reference

    reference = split_reference(path)
    if reference is None:
        raise _not_allowed(path, folder)
    tag, digest = reference
    try:
        entry = ModelStore().get(tag)
    except PackagingError as exc:  # the store's own sentence is for its operator
        raise _not_allowed(path, folder) from exc
    return f"{entry.tag}@{digest or entry.digest}"


def _find_below(folder: Path, path: str) -> Path | None:
    """The folder that `path` means, when it is one below `folder`, where links may not lead out."""
    asked, root = Path(path), folder.resolve()
    if asked.is_absolute():
        parents = [one for one in (folder, root) if asked.is_relative_to(one)]
        if not parents:
            return None
        asked = asked.relative_to(parents[0])
    if ".." in asked.parts:  # refused by its form: whether it exists is nobody's business
        return None
    try:
        found = (root / asked).resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    is_below = found != root and found.is_relative_to(root)
    return found if is_below and found.is_dir() else None


def _not_allowed(path: str, folder: Path | None) -> InvalidRequestError:
    below = "" if folder is None else ", or a folder below the one that the operator has allowed"
    return InvalidRequestError(
        f"lora_path must be a tag that the model store has (name:version){below}; {path[:200]!r} "
        "is not",
        "lora_path",
    )


async def _change(
    served: Served, request: Request, change: Callable[[AdapterRunner], None]
) -> None:
    async def run(runner: Runner, _deadline_s: float) -> None:
        if not isinstance(runner, AdapterRunner) or served.host.text_runner is None:
            raise InvalidRequestError("the model of this service takes no adapters", "lora_name")
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(_one_at_a_time(), change, runner)

    try:
        await served.host.ask(run, disconnection(request.receive))
    except InvalidRequestError as exc:
        if exc.field != "name":
            raise
        raise InvalidRequestError(exc.message, "lora_name") from exc  # as a client calls it


@functools.cache
def _one_at_a_time() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="mlops-adapters")


def _check_enabled(served: Served) -> None:
    if not served.settings.enable_runtime_adapters:
        raise HTTPException(
            404,
            "adapters cannot be changed while this service runs; its operator may allow it with "
            "http.enable_runtime_adapters",
        )
