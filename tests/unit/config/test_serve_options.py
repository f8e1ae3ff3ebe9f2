"""What `mlops serve` is told wins over what a service has of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlops.errors import ServiceError
from mlops.registry import ModelStore
from mlops.serving.bentoml.config import BentoMLConfig
from mlops.serving.bentoml.serve_options import VARIABLE, ServeOptions
from mlops.serving.bentoml.served_model import make_served_model


@pytest.fixture
def model(bentoml_home: Path, tmp_path: Path) -> str:
    file = tmp_path / "weights"
    file.write_text("weights")
    files = [("weights", file)]
    save = ModelStore().save
    return save("chat", None, files, kind="language_model", framework="mlx").tag


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    monkeypatch.setenv(VARIABLE, "")  # so that it is taken back
    adapters = {"formal": str(tmp_path)}
    settings = BentoMLConfig.values(
        {"max_batch_size": 16, "timeout": 20, "http": {"max_prompt_tokens": 10}},
        {"MLOPS_TIMEOUT": "30"},
        max_batch_size=32,
    )
    ServeOptions(("--config", "--adapter"), settings, adapters).hand_on()
    return adapters


@pytest.mark.parametrize(
    "own",
    [
        {"max_batch_size": 7, "workers": 2, "http": {"requests_per_minute": 5}},
        BentoMLConfig.from_dict(
            {"max_batch_size": 7, "workers": 2, "http": {"requests_per_minute": 5}}
        ),
    ],
)
def test_options_stand_above_the_services_own_settings(
    model: str, given: dict[str, str], own: Any
) -> None:
    settings = make_served_model(model, config=own).settings
    assert settings.max_batch_size == 32  # the option, though it is the default, above the file
    assert settings.timeout == 30  # the environment above the file
    assert settings.workers == 2
    assert (settings.http.max_prompt_tokens, settings.http.requests_per_minute) == (10, 5)


def test_adapters_are_added_to_the_services_own(
    model: str, given: dict[str, str], tmp_path: Path
) -> None:
    recipe = make_served_model(model, adapters={"brief": tmp_path}).recipe
    assert recipe
    assert set(recipe["adapters"]) == {"brief", "formal"}
    with pytest.raises(ServiceError, match="has an adapter 'formal' already"):
        make_served_model(model, adapters={"formal": tmp_path})


def test_an_adapter_that_is_nowhere_is_told_before_anything_is_loaded(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    ServeOptions(("--adapter",), {}, {"formal": "./nowhere"}).hand_on()
    with pytest.raises(ServiceError, match="'./nowhere' does not exist"):
        make_served_model(model)


def test_a_service_of_other_code_refuses_them_by_name(given: dict[str, str]) -> None:
    with pytest.raises(ServiceError, match=r"--config, --adapter cannot be honoured.*'Plain'"):
        ServeOptions.given().check_honoured(SimpleNamespace(name="Plain"))
    ServeOptions.given().check_honoured(SimpleNamespace(name="ours", served_model=object()))
    ServeOptions().check_honoured(SimpleNamespace(name="Plain"))


def test_a_service_that_is_told_nothing_is_as_it_was(model: str) -> None:
    assert ServeOptions.given() == ServeOptions()
    assert make_served_model(model, config={"max_batch_size": 7}).settings.max_batch_size == 7


def test_a_model_is_found_under_a_version_that_the_store_has_made(model: str) -> None:
    name, _, version = model.partition(":")
    for settings in ({"model_name": name, "model_version": version}, {"model_name": name}):
        assert make_served_model(config=settings).served.info.model_tag == model
