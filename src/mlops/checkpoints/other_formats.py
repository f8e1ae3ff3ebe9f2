"""Models of other libraries: recognised by what their files say, and stored as they are.

Each check is shallow: it tells a whole file of the format from something else. None runs or
unpickles anything.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mlops.checkpoints.checkpoint import Checkpoint, CheckpointKind
from mlops.checkpoints.files import CheckpointFile, read_json
from mlops.checkpoints.refusal import examples, refusal

MAX_ARCHIVE_MEMBERS = 100_000


class Format(NamedTuple):
    """A file format of another library."""

    name: str
    kind: CheckpointKind
    framework: str
    description: str


FORMATS = {
    ".pt2": Format(
        "pt2", CheckpointKind.PYTORCH, "pytorch", "a PyTorch program made by torch.export"
    ),
    ".onnx": Format("onnx", CheckpointKind.ONNX, "onnx", "an ONNX model"),
    ".mlpackage": Format("mlpackage", CheckpointKind.COREML, "coreml", "a Core ML package"),
    ".mlmodel": Format("mlmodel", CheckpointKind.COREML, "coreml", "a Core ML model"),
    ".mlxfn": Format("mlxfn", CheckpointKind.MLX_FUNCTION, "mlx", "an exported MLX function"),
}
"""By suffix. A `.mlpackage` is a folder."""


def recognise_other(path: Path, files: Mapping[str, CheckpointFile]) -> Checkpoint | None:
    """Recognise a file or folder of one of `FORMATS`; None when there is none.

    Args:
        files: of the folder by relative path, or the one file by its name.

    Raises:
        PackagingError: the file is damaged, or the folder holds several formats.
    """
    if path.suffix.lower() == ".mlpackage" and path.is_dir():
        _check_mlpackage(path, "", files)
        return _checkpoint(FORMATS[".mlpackage"], path, list(files.values()))
    packages = sorted(
        {
            str(parent)
            for name in files
            for parent in PurePosixPath(name).parents
            if parent.suffix.lower() == ".mlpackage"
        }
    )
    found = {
        name: Path(name).suffix.lower()
        for name in files
        if Path(name).suffix.lower() in _CHECKS and not _is_within(name, packages)
    }
    suffixes = sorted({*found.values(), *([".mlpackage"] if packages else [])})
    if not suffixes:
        return None
    if len(suffixes) > 1:
        raise refusal(
            f"{path} holds models in several formats ({', '.join(suffixes)}): "
            f"{examples([*found, *packages])}; give each its own folder",
            path,
            files=[*found, *packages][:10],
        )
    for package in packages:
        inside = {name: files[name] for name in files if _is_within(name, [package])}
        _check_mlpackage(path, f"{package}/", inside)
    for name, suffix in found.items():
        _CHECKS[suffix](path, files[name])
    chosen = [files[name] for name in files if name in found or _is_within(name, packages)]
    return _checkpoint(FORMATS[suffixes[0]], path, chosen)


def _checkpoint(known: Format, path: Path, files: list[CheckpointFile]) -> Checkpoint:
    weight_files = sorted(file.relative_path for file in files)
    megabytes = sum(file.size for file in files) / 2**20
    return Checkpoint(
        path=path,
        kind=known.kind,
        format=known.name,
        framework=known.framework,
        description=f"{known.description}, {megabytes:.1f} MB",
        weight_files=tuple(weight_files),
        weight_bytes=sum(file.size for file in files),
    )


def _is_within(name: str, folders: list[str]) -> bool:
    return any(name.startswith(f"{folder}/") for folder in folders)


def _check_pt2(path: Path, file: CheckpointFile) -> None:
    """An archive with a serialized program, not one of `torch.save`, which holds a pickle."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = archive.namelist()[:MAX_ARCHIVE_MEMBERS]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise _damaged(path, file, "a torch.export archive") from exc
    names = {PurePosixPath(member).name for member in members}
    if any(name.endswith((".pkl", ".py")) for name in names):
        raise refusal(
            f"{file.relative_path} holds a pickle or Python code, as torch.save writes it; save "
            "the program with torch.export.save",
            path,
            file=file.relative_path,
        )
    is_program = "serialized_exported_program.json" in names or "archive_format" in names
    if not is_program:
        raise _damaged(path, file, "a torch.export archive")


def _check_onnx(path: Path, file: CheckpointFile) -> None:
    with file.path.open("rb") as stream:
        fields = set(_protobuf_fields(stream, file.size))
    if not {1, 7} <= fields:  # ModelProto: ir_version is field 1, graph is field 7
        raise _damaged(path, file, "an ONNX model")


def _check_mlmodel(path: Path, file: CheckpointFile) -> None:
    with file.path.open("rb") as stream:
        fields = set(_protobuf_fields(stream, file.size))
    if not {1, 2} <= fields:  # Model: specificationVersion is field 1, description is field 2
        raise _damaged(path, file, "a Core ML model")


def _check_mlxfn(path: Path, file: CheckpointFile) -> None:
    """Begins with MLX's version: a 64-bit length and digits with dots."""
    with file.path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        version = stream.read(length) if 0 < length <= 32 else b""
    if len(version) != length or not version[:1].isdigit() or b"." not in version:
        raise _damaged(path, file, "an exported MLX function")


def _check_mlpackage(path: Path, prefix: str, files: Mapping[str, CheckpointFile]) -> None:
    """The manifest names the parts, and each is there."""
    manifest = files.get(f"{prefix}Manifest.json")
    if manifest is None:
        raise refusal(f"{prefix or path} is no Core ML package: it has no Manifest.json", path)
    entries = read_json(manifest).get("itemInfoEntries")
    if not isinstance(entries, dict) or not entries:
        raise refusal(f"{manifest.relative_path} names no model", path)
    for entry in entries.values():
        item = entry.get("path") if isinstance(entry, dict) else None
        wanted = f"{prefix}Data/{item}"
        if not isinstance(item, str) or not any(
            name == wanted or name.startswith(f"{wanted}/") for name in files
        ):
            raise refusal(
                f"{manifest.relative_path} names {str(item)[:200]!r}, which is missing; copy the "
                "package again",
                path,
                file=manifest.relative_path,
            )


def _protobuf_fields(stream: BinaryIO, size: int) -> Iterator[int]:
    """Numbers of the top-level fields; ends early (with 0) where the bytes are no protobuf."""
    while stream.tell() < size:
        tag = _varint(stream)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _varint(stream)
        elif wire_type in (1, 5):
            stream.seek(8 if wire_type == 1 else 4, 1)
        elif wire_type == 2:
            stream.seek(min(_varint(stream), size + 1), 1)  # a length may be anything
        if number == 0 or wire_type not in (0, 1, 2, 5) or stream.tell() > size:
            yield 0
            return
        yield number


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)
        if not byte:
            return 0
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    return value


def _damaged(path: Path, file: CheckpointFile, wanted: str) -> Exception:
    return refusal(
        f"{file.relative_path} is not {wanted}, or it is cut off; export it again",
        path,
        file=file.relative_path,
    )


_CHECKS: dict[str, Callable[[Path, CheckpointFile], None]] = {
    ".pt2": _check_pt2,
    ".onnx": _check_onnx,
    ".mlmodel": _check_mlmodel,
    ".mlxfn": _check_mlxfn,
}
