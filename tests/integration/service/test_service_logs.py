from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlops.errors import ServiceError
from mlops.serving.bentoml import logs

logger = logging.getLogger("mlops.test_service_logs")


@pytest.fixture(autouse=True)
def attached(bentoml_home: Path) -> Iterator[None]:
    """Undo what `attach` does to the loggers of this process."""
    loggers = [logging.getLogger(name) for name in ("", "bentoml", "mlops")]
    before = [(one, list(one.handlers), one.level) for one in loggers]
    yield
    for one, handlers, level in before:
        for handler in set(one.handlers) - set(handlers):
            handler.close()
        one.handlers = handlers
        one.setLevel(level)


def attach(name: str, tag: str | None = None) -> None:
    service: Any = SimpleNamespace(name=name, bento=SimpleNamespace(tag=tag) if tag else None)
    logs.attach(service)


def test_what_the_service_logs_is_read(bentoml_home: Path) -> None:
    attach("my_service")
    logger.info("model loaded")
    logging.getLogger("bentoml.serve").warning("slow")
    assert [line.split(": ")[-1] for line in logs.read("my_service:latest")] == [
        "model loaded",
        "slow",
    ]
    assert len(logs.read("my_service", num_lines=1)) == 1
    assert logs.read("my_service", num_lines=0) == []
    path = bentoml_home / "mlops" / "logs" / "my_service.log"
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_version_shows_only_its_lines() -> None:
    attach("helpdesk", "helpdesk:1.0.0")
    logger.error("failed", exc_info=ValueError("told in\nseveral lines"))
    lines = logs.read("helpdesk:1.0.0")
    assert lines[-2:] == ["ValueError: told in", "several lines"]
    assert logs.read("helpdesk:2.0.0") == []
    assert logs.read("helpdesk") == lines


def test_a_message_cannot_forge_a_line() -> None:
    attach("my_service")
    logger.info("path=%s", "/a\n2026 ERROR [my_service] forged\x1b[31m\u2028")
    (line,) = logs.read("my_service")
    assert r"/a\n2026" in line
    assert "\x1b" not in line


def test_the_log_is_bounded(monkeypatch: pytest.MonkeyPatch, bentoml_home: Path) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    attach("my_service")
    for number in range(100):
        logger.info("line %d", number)
    folder = bentoml_home / "mlops" / "logs"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 * 2000 + 400
    numbers = [int(line.rsplit(" ", 1)[1]) for line in logs.read("my_service")]
    assert numbers == list(range(numbers[0], 100))
    assert len(numbers) > 10


@pytest.mark.parametrize("obstacle", ["full disk", "no folder", "no file", "no turning over"])
def test_a_log_that_cannot_be_written_costs_nobody_anything(
    obstacle: str,
    bentoml_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = bentoml_home / "mlops" / "logs"
    path = folder / "my_service.log"
    if obstacle == "no folder":
        bentoml_home.mkdir()
        (bentoml_home / "mlops").touch()
    elif obstacle == "no file":
        path.mkdir(parents=True)
    elif obstacle == "no turning over":
        path.with_suffix(".lock").mkdir(parents=True)
        monkeypatch.setattr(logs, "MAX_BYTES", 10)
        path.write_text("full already\n")
    elif not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    else:
        folder.mkdir(parents=True)
        path.symlink_to("/dev/full")
    attach("my_service")
    for number in range(100):
        logger.info("line %d", number)
    said = capfd.readouterr().err
    told_by_the_command = obstacle in {"no folder", "no file"}
    assert said.count("lacks lines until it can be written") == (0 if told_by_the_command else 1)
    assert "Traceback" not in said
    match obstacle:
        case "no folder":
            (bentoml_home / "mlops").unlink()
        case "no file":
            path.rmdir()
        case "no turning over":
            path.with_suffix(".lock").rmdir()
        case "full disk":
            path.unlink()
    monkeypatch.setattr(logs, "_LOOK_S", 0.0)
    logger.info("there is room again")
    logger.info("and more")
    assert logs.read("my_service")[-1].endswith("and more")


def test_following_sees_new_lines() -> None:
    attach("my_service")
    logger.info("old")
    news = logs.follow("my_service")
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append(next(news)), daemon=True)
    reader.start()
    while reader.is_alive():
        logger.info("new")
        reader.join(0.05)
    assert seen[0].endswith("new")


@pytest.mark.parametrize("name", ["never_served", "../secret", "a/b", "", "a\nb"])
def test_no_log(name: str) -> None:
    with pytest.raises(ServiceError):
        logs.read(name)
