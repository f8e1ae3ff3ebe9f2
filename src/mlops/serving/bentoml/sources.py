"""What a service consists of: the code it imports, the files that its import reads, its model.

    python -m mlops.serving.bentoml.sources TARGET FOLDER    prints a `Sources` as JSON

`--reload` asks for it in a process of its own, because a module is imported once a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlops.hardware.home import expand
from mlops.serving.bentoml.config import BentoMLConfig

MODEL_SUFFIXES = frozenset(
    {
        *(".safetensors", ".json", ".jinja", ".model", ".txt"),
        *(".npz", ".npy", ".mlxfn", ".gguf", ".onnx", ".pt2", ".jit", ".mlmodel"),
    }
)
"""Files of a model's folder that count; beside them may be logs and databases."""

_MODEL_FILES = ("*", "*/*")
_WRITES = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Sources:
    """What one service consists of, as absolute paths.

    Attributes:
        name: of the service; None when it could not be imported.
        code: files; one may be missing, and be looked for.
        models: files and folders of models and adapters.
        error: why it could not be imported.
    """

    name: str | None
    code: tuple[str, ...]
    models: tuple[str, ...] = ()
    error: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Sources:
        """What `main` has printed."""
        found = json.loads(text)
        return cls(found["name"], tuple(found["code"]), tuple(found["models"]), found["error"])

    def files(self) -> Iterator[Path]:
        """All files that count now."""
        yield from map(Path, self.code)
        for model in map(Path, self.models):
            if not model.is_dir():
                yield model
                continue
            for pattern in _MODEL_FILES:
                for file in model.glob(pattern):
                    if file.suffix in MODEL_SUFFIXES and not _is_hidden(file.relative_to(model)):
                        yield file


def load_service(target: str, working_dir: str | None) -> Any:
    """Import a service as BentoML's server does.

    Args:
        target: `module:variable`, a folder, or the tag of a Bento.

    Raises:
        ConfigError: a setting in the environment holds what it may not.
        Exception: whatever the import raises.
    """
    from bentoml._internal.log import configure_server_logging
    from bentoml._internal.service.loader import load

    configure_server_logging()
    try:
        return load(target, working_dir=folder_of(target, working_dir))
    except Exception:
        # BentoML tells of a wrong setting as of a tag that is none.
        BentoMLConfig.load()  # raises what is wrong in the environment
        raise


def folder_of(target: str, working_dir: str | None) -> str:
    """Where the service's modules are looked for."""
    if working_dir is not None:
        return working_dir
    folder = expand(target)
    return str(folder) if folder.is_dir() else "."


def load_with_sources(target: str, working_dir: str | None) -> tuple[Any, Sources]:
    """The service, and what it consists of; in a process that has not imported it before.

    Raises:
        Exception: whatever the import raises.
    """
    with _files_read(folder_of(target, working_dir)) as read:
        service = load_service(target, working_dir)
    code = sorted({*_imported_files(), *read, *_latest_of(target, service)})
    models = dict.fromkeys(place for one in _all_services(service) for place in _places(one))
    return service, Sources(service.name, tuple(code), tuple(models))


def find_sources(target: str, working_dir: str | None) -> Sources:
    """What a service consists of, or what is wrong with it; as `load_with_sources`."""
    try:
        service, sources = load_with_sources(target, working_dir)
        if http_options := getattr(service, "http_options", None):
            http_options.to_settings()  # the keys
    except (Exception, SystemExit) as exc:
        cause = _cause(exc)
        code = {*_imported_files(), *_blamed_files(cause)}
        return Sources(None, tuple(sorted(code)), error=_describe(cause))
    return sources


@contextlib.contextmanager
def _files_read(folder: str) -> Iterator[set[str]]:
    """The files below a folder that this block reads and does not write, such as settings."""
    below = Path(folder).resolve()
    read: set[str] = set()
    written: set[str] = set()
    is_on = True

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and is_on and isinstance(arguments[0], str):
            (written if arguments[2] & _WRITES else read).add(os.path.realpath(arguments[0]))

    sys.addaudithook(note)  # a hook stays
    try:
        yield read
    finally:
        is_on = False
        read -= written
        read -= {one for one in read if not Path(one).is_relative_to(below) or not _is_project(one)}


def _imported_files() -> set[str]:
    """The source of every module that is not installed."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return {file for file in files if file and file.endswith(".py") and _is_project(file)}


def _is_project(file: str) -> bool:
    """Whether a file is the user's: neither Python's nor installed, nor compiled from another."""
    path = Path(file)
    places = {*path.parts} & {"site-packages", "dist-packages", "__pycache__", ".git"}
    python = sysconfig.get_paths()["stdlib"]
    return not places and not path.is_relative_to(python) and path.suffix != ".pyc"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _latest_of(target: str, service: Any) -> Iterator[str]:
    """The pointer to a Bento's newest version, when the target names none."""
    bento = getattr(service, "bento", None)
    if bento is not None and target.partition(":")[2] in {"", "latest"}:
        yield str(Path(bento.path).parent / "latest")


def _all_services(service: Any) -> list[Any]:
    """A service and those that it depends on."""
    return [service, *service.all_services(exclude_urls=True).values()]


def _places(service: Any) -> Iterator[str]:
    """Where the model and the adapters of one of our services are; nothing for hub ids."""
    from mlops.registry import ModelStore
    from mlops.registry.references import split_reference

    served_model = getattr(service, "served_model", None)
    for model in getattr(served_model, "models", ()):
        if Path(model).exists():
            yield str(Path(model).absolute())
        elif reference := split_reference(model):
            entry = ModelStore().get(reference[0])
            yield str(entry.path)
            if reference[0].partition(":")[2] in {"", "latest"}:
                yield str(entry.path.parent / "latest")


def _cause(exc: BaseException) -> BaseException:
    """What BentoML's loader has wrapped into errors of its own."""
    from bentoml.exceptions import BentoMLException

    while isinstance(exc, BentoMLException) and exc.__context__ is not None:
        exc = exc.__context__
    return exc


def _describe(exc: BaseException) -> str:
    """One line: where, and what."""
    from mlops.errors import MLOpsError

    kind = "" if isinstance(exc, MLOpsError) else f"{type(exc).__name__}: "
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{short(exc.filename)}, line {exc.lineno}: {kind}{exc.msg}"
    frames = [one for one in traceback.extract_tb(exc.__traceback__) if _is_users(one.filename)]
    where = f"{short(frames[-1].filename)}, line {frames[-1].lineno}: " if frames else ""
    return f"{where}{kind}{exc}"


def _blamed_files(exc: BaseException) -> Iterator[str]:
    """Files whose change may mend it."""
    for frame in traceback.extract_tb(exc.__traceback__):
        if _is_users(frame.filename):
            yield frame.filename
    if isinstance(exc, SyntaxError) and exc.filename and _is_users(exc.filename):
        yield exc.filename
    if isinstance(exc, ModuleNotFoundError) and exc.name:
        for folder in sys.path:
            module = Path(folder or ".", *exc.name.split(".")).absolute()
            if _is_project(str(module)):
                yield from (f"{module}.py", f"{module}/__init__.py")


def _is_users(file: str) -> bool:
    """A file of the project, and not of this toolkit, which may be run from its source."""
    package = Path(__file__).resolve().parents[2]
    return Path(file).is_absolute() and _is_project(file) and not Path(file).is_relative_to(package)


def short(file: str | Path) -> str:
    """A path as a user in the working directory would say it."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def main(arguments: Sequence[str]) -> None:
    """Print what the service consists of; what it prints itself goes to stderr."""
    target, working_dir = arguments
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        json.dump(asdict(find_sources(target, working_dir or None)), answer)


if __name__ == "__main__":
    main(sys.argv[1:])
