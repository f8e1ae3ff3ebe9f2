"""`mlops deploy` and `mlops scale`: what was typed wrong is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlops.cli import main
from mlops.cli.deploy import parse_replicas


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLOPS_DEBUG", raising=False)


def said_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
    status: int,
) -> str:
    """What `mlops` says before it ends with this status; nothing of it on stdout."""
    monkeypatch.setattr(sys, "argv", ["mlops", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == status
    assert said.out == ""
    return said.err


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The one sentence of a command that cannot do what it was asked."""
    (sentence,) = said_at_the_end(monkeypatch, capsys, *arguments, status=1).splitlines()
    return sentence


def misunderstood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What `mlops` says of a command line that makes no sense."""
    return said_at_the_end(monkeypatch, capsys, *arguments, status=2)


REPLICAS = "replicas are not allowed; use a number from 1 to 1000, or the fewest and the most"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *(
            (("--replicas", text), f"{text!r} {REPLICAS}")
            for text in ("x", "1:x", "1:", ":4", "1:2:3", "1.5", "", "0", "1:1001", "4:1")
        ),
        (("--adapter", "broken"), "--adapter takes NAME=TAG, not 'broken'"),
        (("--adapter", "a=a:1", "--adapter", "=b:1"), "--adapter takes NAME=TAG, not '=b:1'"),
        (("--adapter", "a="), "--adapter a= names no tag"),
        (("--adapter", ""), "--adapter takes NAME=TAG, not ''"),
        (("--adapter", "a=x:1", "--adapter", "a=y:1"), "--adapter names 'a' twice"),
    ],
)
def test_what_cannot_be_understood(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    for more in ((), ("--dry-run",)):
        said = misunderstood(monkeypatch, capsys, "deploy", "chat:1.0.0", *arguments, *more)
        assert sentence in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--backend", "ray"), "--backend 'ray' is not allowed"),
        (("--backend", "bentoml"), "serving_backend is 'bentoml'; use 'hybrid' or 'ray_serve'"),
        (("--route-prefix", "chat"), "--route-prefix 'chat' is not allowed"),
        (("--ray-address", "head"), "--ray-address 'head' is not allowed"),
        (("--host", "example.org"), "--host 'example.org' is not allowed"),
        (("--port", "0"), "--port 0 is not allowed"),
        (("--model-source", ""), "--model-source '' is not allowed"),
        (("--config", "missing.yaml"), "missing.yaml cannot be read"),
    ],
)
def test_what_deploy_cannot_use(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    for more in ((), ("--dry-run",)):
        said = refusal(monkeypatch, capsys, "deploy", "chat:1.0.0", *arguments, *more)
        assert said.startswith(sentence)


def test_a_file_is_named_with_what_is_wrong_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("ray: {gpus: 1}\n")
    said = refusal(monkeypatch, capsys, "deploy", "chat:1.0.0", "--config", str(file))
    assert said.startswith(f"{file}: ray has no setting 'gpus'")
    assert "num_gpus" in said
    file.write_text("port: 0\n")
    said = refusal(monkeypatch, capsys, "deploy", "chat:1.0.0", "--config", str(file))
    assert said.startswith(f"{file}: port = 0 is not allowed"), "nobody has typed --port"


@pytest.mark.parametrize("replicas", ["x", "1:", "two"])
def test_what_scale_cannot_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], replicas: str
) -> None:
    said = misunderstood(monkeypatch, capsys, "scale", "support-chat", replicas)
    assert f"{replicas!r} {REPLICAS}" in said


def test_a_bento_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bentoml_home: Path
) -> None:
    for backend in ("hybrid", "ray_serve"):
        asked = ("deploy", "nobody:1.0.0", "--backend", backend, "--dry-run")
        said = refusal(monkeypatch, capsys, *asked)
        assert said.startswith("there is no Bento 'nobody:1.0.0' in the store")


@pytest.mark.parametrize(("text", "replicas"), [("2", (2, 2)), ("1:4", (1, 4)), ("3:3", (3, 3))])
def test_replicas_are_a_number_or_a_range(text: str, replicas: tuple[int, int]) -> None:
    assert parse_replicas(text) == replicas
