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
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlops.errors import IntegrityError

FILE_NAME = "mlops-manifest.json"
FORMAT = 1
MAX_BYTES = 16 * 1024 * 1024

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


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
        manifest = Manifest(
            files=tuple(_read_file(file) for file in data["files"]),
            kind=str(data["kind"]),
            framework=str(data["framework"]),
            base_digest=data["base_digest"],
            base_tag=data["base_tag"],
        )
        digest = manifest.digest
    except FileNotFoundError as exc:
        raise _damaged(path, "it is missing; the entry was not made by this toolkit") from exc
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise _damaged(path, f"it cannot be read ({exc})") from exc
    if data.get("digest") != digest:
        raise _damaged(path, f"it claims the digest {data.get('digest')}, not {digest}")
    return manifest


def _read_file(data: dict[str, Any]) -> StoredFile:
    """Raises `ValueError`, `TypeError` or `KeyError` for what is no file of an entry."""
    file = StoredFile(**data)
    parts = PurePosixPath(file.path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"it names a file outside of the entry: {file.path!r}")
    if type(file.size) is not int or type(file.sha256) is not str:
        raise TypeError(f"the size or digest of {file.path!r} is none")
    return file


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"the manifest {path} is not valid: {why}; package the model again",
        "read_manifest",
        {"path": str(path)},
    )
