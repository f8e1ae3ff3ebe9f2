"""What an entry of the model store consists of, and the one digest that stands for it.

The manifest is a JSON file beside the model's files. Its digest is the SHA-256 of the canonical
JSON of `content`: every file with its size and SHA-256, what kind of checkpoint it is, and the
digest of its base model. Times, labels and tags are left out, so the same input always has the same
digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlops.errors import IntegrityError

FILE_NAME = "mlops-manifest.json"
FORMAT = 1
MAX_BYTES = 16 * 1024 * 1024

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, order=True)
class StoredFile:
    """One file of an entry.

    Attributes:
        path: POSIX path relative to the entry's folder.
        size: bytes.
        sha256: 64 hexadecimal digits.
    """

    path: str
    size: int
    sha256: str

    @property
    def blob_name(self) -> str:
        """The name of its content, wherever blobs are kept."""
        return f"{self.size}-{self.sha256}"


@dataclass(frozen=True)
class Manifest:
    """The content of one entry.

    Attributes:
        files: every file but BentoML's own `model.yaml` and the manifest, ordered by path.
        kind: value of `checkpoints.CheckpointKind`.
        framework: "mlx", "transformers", "pytorch", "onnx" or "coreml".
        base_digest: digest of the base model of an adapter, else None.
        base_tag: where that base model is in the same store; not part of the digest.
    """

    files: tuple[StoredFile, ...]
    kind: str
    framework: str
    base_digest: str | None = None
    base_tag: str | None = None

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""
        return digest_of(
            {
                "files": [asdict(file) for file in self.files],
                "kind": self.kind,
                "framework": self.framework,
                "base_digest": self.base_digest,
            }
        )

    @property
    def files_digest(self) -> str:
        """Digest of the files alone, as `client.log_model` gives it to a folder that it logs."""
        return digest_of([asdict(file) for file in self.files])

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> str:
        """The manifest as it is written to disk."""
        return json.dumps(
            {"format": FORMAT, "digest": self.digest, **asdict(self)}, indent=1, sort_keys=True
        )


def digest_of(content: Any) -> str:
    """SHA-256 of the canonical JSON of `content`: sorted keys, no spaces, UTF-8."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def is_digest(text: str) -> bool:
    """True for `sha256:` and 64 hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def is_portable(path: str) -> bool:
    """True for a relative POSIX path that leads to one and the same place on every system."""
    pure = PurePosixPath(path)
    return (
        bool(pure.parts)
        and not pure.is_absolute()
        and ".." not in pure.parts
        and str(pure) == path
        and path.isprintable()
        and "\\" not in path
    )


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the entry in `folder`.

    Raises:
        IntegrityError: it is missing, not a manifest, or does not have the digest it claims.
    """
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _damaged(path, f"it is larger than {MAX_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        manifest = parse_manifest(data)
        digest = manifest.digest
    except FileNotFoundError as exc:
        raise _damaged(path, "it is missing; the entry was not made by this toolkit") from exc
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise _damaged(path, f"it cannot be read ({exc})") from exc
    if data.get("digest") != digest:
        raise _damaged(path, f"it claims the digest {data.get('digest')}, not {digest}")
    return manifest


def parse_manifest(data: Mapping[str, Any]) -> Manifest:
    """The manifest that parsed JSON holds.

    Raises:
        ValueError, TypeError, KeyError: it holds none, or one whose files no entry could have.
    """
    manifest = Manifest(
        files=parse_files(data["files"]),
        kind=data["kind"],
        framework=data["framework"],
        base_digest=data["base_digest"],
        base_tag=data["base_tag"],
    )
    of_base = (manifest.base_digest, manifest.base_tag)
    if not all(isinstance(text, str) for text in (manifest.kind, manifest.framework)):
        raise TypeError("its kind and framework are no text")
    if not all(text is None or isinstance(text, str) for text in of_base):
        raise TypeError("its base model is no tag and digest")
    return manifest


def parse_files(data: Any) -> tuple[StoredFile, ...]:
    """The files that parsed JSON names.

    Raises:
        ValueError, TypeError: it names none, one outside of the entry, or one twice.
    """
    if type(data) is not list:
        raise TypeError("its files are no list")
    files = tuple(StoredFile(**item) for item in data)
    for file in files:
        if not is_portable(file.path):
            raise ValueError(f"it names a file outside of the entry: {file.path!r}")
        if type(file.size) is not int or file.size < 0 or not _SHA256.fullmatch(file.sha256):
            raise ValueError(f"the size or digest of {file.path!r} is none")
    if len({file.path for file in files}) != len(files):
        raise ValueError("it names a file twice")
    return files


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"the manifest {path} is not valid: {why}; package the model again",
        "read_manifest",
        {"path": str(path)},
    )
