"""The fenced blocks of the project's Markdown files, and what is to be done with each.

The words after the opening fence say it. The first is the language:

- `python`, `bash`: run. The Python blocks of one document share their variables.
- `python`, `yaml`, `toml` or `json` with `file=NAME`: written to that file.
- `bash background`: started and waited for until it is ready; the next such block stops it.
- `json response`: what the block before printed has these fields, with values of these types.
- `text output`: what the block before printed; `…` stands for any text, alone for any lines.
- `needs=WHAT`: a key of `NEEDS`; where that is missing the block is checked but not run.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

REPOSITORY = Path(__file__).resolve().parents[2]

NEEDS = {
    "clone": "changes the clone that it is run in",
    "docker": "needs a container engine and the network",
    "kubernetes": "needs a Kubernetes cluster with KubeRay",
    "lsof": "needs lsof",
    "network": "needs the network",
    "ray": "needs a Ray cluster",
}
"""What a block may need besides this project, and why it is skipped without."""

_WAYS: dict[str, set[frozenset[str]]] = {
    "python": {frozenset(), frozenset({"file"}), frozenset({"needs"})},
    "bash": {frozenset(), frozenset({"background"}), frozenset({"needs"})},
    "json": {frozenset({"response"}), frozenset({"file"})},
    "yaml": {frozenset({"file"})},
    "toml": {frozenset({"file"})},
    "text": {frozenset({"output"})},
}
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of the opening fence, counted from 1.
        attributes: the words after the language; a word without `=` has the value "".
    """

    document: Path
    line: int
    language: str
    attributes: dict[str, str]
    content: str

    @property
    def name(self) -> str:
        """Such as `docs/guide.md:123`."""
        return f"{os.path.relpath(self.document, REPOSITORY)}:{self.line}"

    @property
    def needs(self) -> str | None:
        """What the block cannot run without."""
        return self.attributes.get("needs")


def find_documents() -> list[Path]:
    """Every Markdown file of the project, ordered by path: what git has, or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        found = {REPOSITORY / name for name in listed.stdout.split("\0") if name}
    else:  # a copy without git's folder
        found = set(REPOSITORY.glob("*.md")) | set(REPOSITORY.glob("[!.]*/**/*.md"))
    return sorted(path for path in found if path.is_file())


def find_blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document.

    Raises:
        ValueError: the words after a fence are none that the module's docstring lists.
    """
    return list(_blocks(document))


def count_fences(document: Path) -> int:
    """Lines that look like a fence, found without the parser: two for each block."""
    return len(_FENCE.findall(document.read_text(encoding="utf-8")))


def _blocks(document: Path) -> Iterator[Block]:
    for token in MarkdownIt().parse(document.read_text(encoding="utf-8")):
        if token.type != "fence" or token.map is None:
            continue
        language, *words = token.info.split() or [""]
        attributes = {word.partition("=")[0]: word.partition("=")[2] for word in words}
        block = Block(document, token.map[0] + 1, language, attributes, token.content)
        if frozenset(attributes) not in _WAYS.get(language, set()):
            raise ValueError(f"{block.name}: ```{token.info} says nothing that is done with it")
        if block.needs is not None and block.needs not in NEEDS:
            raise ValueError(f"{block.name}: needs={block.needs} is none of {', '.join(NEEDS)}")
        yield block
