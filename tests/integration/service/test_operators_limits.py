"""What an operator allows, in a whole BentoML service and in the command that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from embedding_models import write_embedding_model
from mlops.errors import ConfigError
from mlops.serving.bentoml.commands import _check_keys
from mlops.serving.bentoml.config import BentoMLConfig
from mlops.serving.bentoml.service import create_bentoml_service
from tiny_models import write_language_model

pytestmark = [
    pytest.mark.usefixtures("bentoml_home"),
    # BentoML's own request handling
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

KEY = "a-key-of-the-first-team"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - nothing is bound here


class CustomRunner:
    """There to be loaded; nobody asks it."""

    def __init__(self, model_path: str) -> None:
        self.is_loaded = False

    def load_model(self) -> None:
        self.is_loaded = True

    def predict(self, input_data: Any) -> dict[str, Any]:
        raise NotImplementedError

    def predict_batch(self, inputs: Any) -> list[dict[str, Any]]:
        raise NotImplementedError

    def get_memory_usage(self) -> dict[str, Any]:
        return {}

    def unload_model(self) -> None:
        self.is_loaded = False


def make_service(folder: Path, **http: Any) -> Any:
    return create_bentoml_service(
        folder, "guarded", runner_class=CustomRunner, config=BentoMLConfig(http=http)
    )


@pytest.fixture
def text_client(tmp_path: Path) -> Iterator[TestClient]:
    base = write_language_model(tmp_path / "base")
    config = BentoMLConfig(http={"max_prompt_tokens": 8})
    service = create_bentoml_service(base, "short_prompts", config=config)
    with TestClient(service.to_asgi(), raise_server_exceptions=False) as client:
        yield client


def test_a_long_prompt_is_refused(text_client: TestClient) -> None:
    fits = {"prompt": [5] * 8, "max_tokens": 1}
    assert text_client.post("/predict", json=fits).status_code == 200
    refused = text_client.post("/predict", json={**fits, "prompt": [5] * 9})
    assert refused.status_code == 422
    assert refused.json()["error"] == {
        "type": "PromptTooLongError",
        "message": "prompt has 9 tokens; this service takes 8 at most",
        "field": "prompt",
    }
    body = {"model": "short_prompts", **fits, "prompt": [5] * 9}
    refused = text_client.post("/v1/completions", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "prompt")
    assert error["code"] == "context_length_exceeded"


def test_a_long_text_to_embed_is_refused(tmp_path: Path) -> None:
    model = write_embedding_model(tmp_path / "vectors")
    config = BentoMLConfig(http={"max_prompt_tokens": 8})
    service = create_bentoml_service(model, "short_texts", config=config)
    with TestClient(service.to_asgi(), raise_server_exceptions=False) as client:
        body = {"model": "short_texts", "input": [[5] * 8, [5] * 8]}
        assert client.post("/v1/embeddings", json=body).status_code == 200
        refused = client.post("/v1/embeddings", json={**body, "input": [[5] * 8, [5] * 9]})
    assert refused.status_code == 400
    assert "input[1] has 9 tokens; this service takes 8 at most" in refused.text
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_bentomls_own_routes_need_a_key_and_have_our_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_API_KEYS", KEY)
    with TestClient(make_service(tmp_path).to_asgi(), raise_server_exceptions=False) as client:
        for path in ("/schema.json", "/", "/static_content/x", "/nowhere", "/v1/nowhere"):
            assert client.get(path).status_code == 401
        assert client.get("/healthz").status_code == 200
        headers = {"X-API-Key": KEY}
        assert client.get("/schema.json", headers=headers).status_code == 200
        missing = client.get("/nowhere", headers=headers)
        assert missing.json()["error"]["type"] == "NotFound"
        missing = client.get("/v1/nowhere", headers=headers)
        assert missing.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("host", "warns"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        (EVERYWHERE, True),
        ("192.0.2.7", True),
        ("::", True),
        (None, False),  # our configuration's own default
    ],
)
def test_an_open_address_without_keys_warns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str | None,
    warns: bool,
) -> None:
    service = make_service(tmp_path)
    _check_keys(service, host)
    told = capsys.readouterr()
    assert not told.out
    assert ("Warning: " in told.err and "MLOPS_API_KEYS" in told.err) is warns
    monkeypatch.setenv("MLOPS_API_KEYS", KEY)
    _check_keys(service, host)
    assert not capsys.readouterr().err


def test_an_open_address_of_the_configuration_warns_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BentoMLConfig(host=EVERYWHERE)
    service = create_bentoml_service(tmp_path, "open", runner_class=CustomRunner, config=config)
    _check_keys(service, None)
    assert "listens on 0.0.0.0 and has no API keys" in capsys.readouterr().err


def test_bad_keys_are_told_before_anything_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service = make_service(tmp_path, api_key_file="keys")
    monkeypatch.chdir("/")  # as BentoML's workers do
    with pytest.raises(ConfigError, match="No such file"):
        _check_keys(service, "127.0.0.1")
    (tmp_path / "keys").write_text(f"{KEY}\n")
    _check_keys(service, EVERYWHERE)


def test_a_service_of_others_is_not_our_business(capsys: pytest.CaptureFixture[str]) -> None:
    _check_keys(object(), EVERYWHERE)
    assert not capsys.readouterr().err
