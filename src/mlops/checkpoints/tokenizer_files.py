"""Which files of a folder are its tokenizer's: vocabulary, settings, chat templates, end tokens.

A model's lie beside its weights. An adapter's, where its trainer saved them, lie beside its own,
and say how a request for it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from mlops.checkpoints.files import CheckpointFile, Folder, read_json
from mlops.checkpoints.refusal import refusal

CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"
"""Where processors of texts and images had their template before they wrote `.jinja`."""

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "*.tiktoken",
)
"""A folder with one of these has a tokenizer of its own."""

TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja", PROCESSOR_TEMPLATE)
SETTINGS = (
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    GENERATION_CONFIG,
)
MAX_BYTES = 256 * 1024 * 1024
"""Of one file; the largest vocabularies have 30 MB."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer's files of one folder.

    Attributes:
        path: the folder.
        files: by name, relative to it.
    """

    path: Path
    files: Mapping[str, CheckpointFile]

    @property
    def has_vocabulary(self) -> bool:
        """True when they are a whole tokenizer; otherwise they add to another's."""
        return has_vocabulary(self.files)

    @cached_property
    def has_template(self) -> bool:
        """True when there is a chat template among them."""
        return any(_matches(name, TEMPLATES) for name in self.files) or bool(
            self.read(CONFIG).get("chat_template")
        )

    @property
    def processor_template(self) -> Any:
        """The template of a processor, unchecked, where there is no other; else None.

        Raises:
            PackagingError: its file is not JSON.
        """
        others = [name for name in self.files if _matches(name, TEMPLATES[:-1])]
        if others or self.read(CONFIG).get("chat_template"):
            return None
        return self.read(PROCESSOR_TEMPLATE).get("chat_template")

    @cached_property
    def digest(self) -> str:
        """Of names and contents; the same for the same tokenizer, wherever it lies."""
        total = hashlib.sha256()
        for name in sorted(self.files):
            total.update(f"{name}\0{_digest(self.files[name].path)}\n".encode())
        return total.hexdigest()

    def adds_to(self, other: TokenizerFiles) -> bool:
        """Whether one of them is missing in `other`, or has another content there."""
        return any(
            name not in other.files
            or file.size != other.files[name].size
            or _digest(file.path) != _digest(other.files[name].path)
            for name, file in self.files.items()
        )

    def over(self, base: TokenizerFiles) -> dict[str, Path]:
        """What a tokenizer is read from, by name: these, over those of `base` where they need them.

        Templates of the base are left out where these have one: a file of its own stands over what
        `tokenizer_config.json` says, and it would be the base's.
        """
        taken = dict(base.files)
        if self.has_vocabulary:
            taken = {name: file for name, file in taken.items() if _matches(name, SETTINGS)}
            taken.pop("merges.txt", None)
        if self.has_vocabulary and CONFIG in self.files:
            taken = {}
        if self.has_template:
            taken = {name: file for name, file in taken.items() if not _matches(name, TEMPLATES)}
        return {name: file.path for name, file in (taken | dict(self.files)).items()}

    def read(self, name: str) -> dict[str, Any]:
        """The object in one of their JSON files; {} when there is no such file.

        Raises:
            PackagingError: it is not JSON, or no object.
        """
        return read_json(self.files[name]) if name in self.files else {}


def find_tokenizer_files(path: str | Path) -> TokenizerFiles:
    """The tokenizer's files in a folder, of which there may be none.

    Raises:
        PackagingError: one of them is too large, or `list_files` refuses the folder.
    """
    path = Path(path)
    folder = Folder(path)
    found = {
        name: folder[name]
        for name in folder
        if _matches(name, (*VOCABULARIES, *TEMPLATES, *SETTINGS))
    }
    for name, file in found.items():
        if file.size > MAX_BYTES:
            raise refusal(
                f"{name} in {path} is {file.size} bytes long, over the limit of {MAX_BYTES}",
                path,
                file=name,
            )
    return TokenizerFiles(path, found)


def has_vocabulary(names: Collection[str]) -> bool:
    """Whether a tokenizer is among the files of these names."""
    return any(_matches(name, VOCABULARIES) for name in names)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


_digests: dict[tuple[int, int, int, int], str] = {}
"""By device, inode, size and time: entries of the store share the files that are the same."""

_MAX_DIGESTS = 4096


def _digest(path: Path) -> str:
    status = path.stat()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    found = _digests.get(key)
    if found is None:
        if len(_digests) >= _MAX_DIGESTS:
            _digests.clear()
        with path.open("rb") as file:
            found = _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
