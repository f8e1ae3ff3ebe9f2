"""The harness notices what is wrong with a block."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import REPOSITORY, Block, find_blocks
from running import BlockError, DocumentSession, check_fields, check_output, last_json


def block(language: str, content: str, **attributes: str) -> Block:
    return Block(REPOSITORY / "README.md", 1, language, attributes, content)


@pytest.fixture
def session(tmp_path: Path) -> DocumentSession:
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    return DocumentSession(folder, home)


@pytest.mark.parametrize(
    "info",
    ["", "ruby", "json", "text", "bash skip", "python background", "bash needs=luck", "yaml"],
)
def test_a_fence_that_says_nothing_useful_is_refused(tmp_path: Path, info: str) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"```{info}\nx\n```\n")
    with pytest.raises(ValueError, match=r"document.md:1: .*(says nothing|is none of)"):
        find_blocks(document)


def test_python_blocks_share_their_variables(session: DocumentSession) -> None:
    session.run(block("python", "number = 3\nprint('first')"))
    session.run(block("python", "print(number + 1)"))
    assert session.run(block("text", "4", output="")) is None
    with pytest.raises(BlockError, match=r"README.md.*line 2[\s\S]*ZeroDivisionError"):
        session.run(block("python", "number / 0"))
    session.close()


def test_a_command_that_fails_fails_its_block(session: DocumentSession) -> None:
    with pytest.raises(BlockError, match="exit status 1"):
        session.run(block("bash", "false\ntrue"))
    with pytest.raises(BlockError, match="exit status 1"):
        session.run(block("bash", "false | true"))


def test_a_server_that_ends_fails_its_block(session: DocumentSession) -> None:
    with pytest.raises(BlockError, match=r"the server ended[\s\S]*no model"):
        session.run(block("bash", "echo no model; exit 3", background=""))
    session.close()


def test_what_cannot_run_is_checked_and_says_why(session: DocumentSession) -> None:
    reason = session.run(block("bash", "docker run -p 3000:3000 x", needs="docker"))
    assert reason == "needs a container engine and the network"
    assert session.run(block("text", "up", output="")) == "the block before was not run"
    with pytest.raises(BlockError, match="syntax error"):
        session.run(block("bash", "if true", needs="docker"))
    with pytest.raises(BlockError, match="no-such-target"):
        session.run(block("bash", "make no-such-target", needs="clone"))
    with pytest.raises(BlockError, match="bentoml no-such-command"):
        session.run(block("bash", "bentoml no-such-command x", needs="docker"))


def test_the_port_of_the_text_becomes_a_free_one(session: DocumentSession) -> None:
    session.run(block("bash", "echo localhost:3000/health 13000"))
    session.run(block("text", f"localhost:{session.port}/health 13000", output=""))


@pytest.mark.parametrize(
    "found",
    [
        {"a": 1},
        {"a": 1, "b": {"c": None}},
        {"a": True, "b": {"c": "x"}},
        {"a": "1", "b": {"c": "x"}},
        {"a": 1, "b": []},
        [],
    ],
)
def test_an_answer_with_other_fields_or_types(found: object) -> None:
    with pytest.raises(BlockError):
        check_fields({"a": 1, "b": {"c": "text"}}, found)


def test_an_answer_may_have_more_fields_and_other_values() -> None:
    check_fields({"a": 1, "b": [{"c": ""}]}, {"a": 2.5, "b": [{"c": "x"}, {}], "d": None})


def test_the_last_json_object_counts() -> None:
    assert last_json('curl {\n{"a": 1}{"b": {"c": 2}}\n') == {"b": {"c": 2}}
    with pytest.raises(BlockError, match="no JSON object"):
        last_json("Not Found")


def test_output_with_gaps() -> None:
    check_output("stored …\n…\nend\n", "stored 3 MB\none\ntwo\nend\n")
    check_output("stored …\n…\nend\n", "stored \nend\n\n")
    with pytest.raises(BlockError):
        check_output("stored …\nend\n", "stored 3 MB\none\nend\n")
