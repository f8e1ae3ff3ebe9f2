from __future__ import annotations

from pathlib import Path

import bentoml
import pytest

from mlops.cli.asking import Service
from mlops.cli.serve import _service_of, is_service
from mlops.errors import ServiceError
from mlops.serving.bentoml import commands


@pytest.fixture(autouse=True)
def project(bentoml_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "service.py").write_text("svc = None\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("service:svc", True),
        ("service.py:svc", True),
        ("service.py", True),
        (".", True),
        ("mlops.cli.serve:serve", True),
        ("model", False),
        ("org/model", False),
        ("org/model@main", False),
        ("stored-model:1.0.0", False),
        ("no.such.module:svc", False),
        ("json", False),
    ],
)
def test_services_and_models_are_told_apart(target: str, expected: bool) -> None:
    assert is_service(target) is expected


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("model", "model"),
        ("org/Tiny-Llama@main", "tiny-llama"),
        ("helpdesk:1.0.0", "helpdesk"),
        ("weird name'\n/…", "model"),
    ],
)
def test_a_model_gets_a_service_of_its_name(model: str, name: str) -> None:
    source = _service_of(model)
    compile(source, "service.py", "exec")
    assert f"service_name={name!r}" in source


def test_an_address_that_is_none() -> None:
    with pytest.raises(ServiceError):
        Service("not an address", 1).predict({"text": "a"})


def test_a_key_of_several_lines_is_refused_and_not_shown() -> None:
    with pytest.raises(ServiceError, match="must be one line") as caught:
        Service("http://127.0.0.1:9", 1, "first-secret-key\nsecond-secret-key")
    assert "secret" not in str(caught.value)


@bentoml.service
class Plain:
    @bentoml.api
    def shout(self, text: str) -> str:
        return text.upper()


@bentoml.service(http={"host": "127.0.0.2"})
class Chosen(Plain.inner):
    pass


def test_only_this_machine_unless_something_else_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bentoml.serving import running_inside_container

    running_inside_container.cache_clear()
    assert commands._default_host(Plain) == "127.0.0.1"
    assert commands._default_host(Chosen) is None
    monkeypatch.setenv("BENTOML_CONTAINERIZED", "true")
    running_inside_container.cache_clear()
    assert commands._default_host(Chosen) == "0.0.0.0"  # noqa: S104
    monkeypatch.undo()
    running_inside_container.cache_clear()


def test_bentomls_own_options_are_there_once() -> None:
    from bentoml_cli.cli import cli

    names = [parameter.name for parameter in commands.serve.params]
    assert {"workers", "port", "host", "reload", "env", "verbosity"} <= set(names)
    assert cli.commands["serve"] is commands.serve
    assert names.count("do_not_track") == 1
