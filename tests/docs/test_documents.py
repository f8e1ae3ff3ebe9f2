"""Every fenced block of every Markdown file does what the file says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from documents import REPOSITORY, Block, count_fences, find_blocks, find_documents
from running import DocumentSession

import tiny_models

DOCUMENTS = find_documents()
BLOCKS = [block for document in DOCUMENTS for block in find_blocks(document)]
DEMO_MODEL = REPOSITORY / "src" / "mlops" / "demo" / "base_model"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a team has it after training; the documents speak of these paths."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(REPOSITORY / "examples" / "kuberay", folder / "examples" / "kuberay")
    base = folder / "models" / "my_model"
    if (DEMO_MODEL / "model.safetensors").is_file():
        shutil.copytree(DEMO_MODEL, base)
    else:
        tiny_models.write_language_model(base)
    checkpoints = folder / "outputs" / "checkpoints"
    tiny_models.write_lora_adapter(
        checkpoints / "checkpoint_epoch_2", base, scale=0.1, base_reference="models/my_model"
    )
    tiny_models.write_peft_adapter(
        checkpoints / "final", base, alpha=0.4, base_reference="models/my_model"
    )
    return folder


@pytest.fixture(scope="module")
def session_of(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Path], DocumentSession]]:
    """The session of a document; that of the document before is closed."""
    current: dict[Path, DocumentSession] = {}

    def session_of(document: Path) -> DocumentSession:
        if document not in current:
            close()
            folder = tmp_path_factory.mktemp(document.stem) / "work"
            shutil.copytree(models, folder)
            current[document] = DocumentSession(folder, tmp_path_factory.mktemp("home"))
        return current[document]

    def close() -> None:
        while current:
            current.popitem()[1].close()

    yield session_of
    close()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(block: Block, session_of: Callable[[Path], DocumentSession]) -> None:
    session = session_of(block.document)
    # One block may be asked for alone: what comes before it is run first.
    for earlier in find_blocks(block.document):
        if session.last_line < earlier.line < block.line:
            session.run(earlier)
    if skipped := session.run(block):
        pytest.skip(reason=skipped)


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)
def test_no_block_is_left_out(document: Path) -> None:
    ours = [block for block in BLOCKS if block.document == document]
    assert 2 * len(ours) == count_fences(document)


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([\w/.]+\.(?:py|c))` \|", text, re.MULTILINE))
    package = REPOSITORY / "src" / "mlops"
    there = {
        path.relative_to(package).as_posix()
        for pattern in ("*.py", "*.c")
        for path in package.rglob(pattern)
        if path.stat().st_size
    }
    assert told == there


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    for target in targets:
        path, _, heading = target.partition("#")
        if ":" not in path:
            linked = document.parent / path if path else document
            assert linked.exists(), target
            assert not heading or heading in headings(linked), target


def headings(document: Path) -> set[str]:
    """What the headings of a document are called in a link."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
