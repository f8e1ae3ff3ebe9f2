"""Requests that schemathesis makes from the description of the API, to a real server.

Right and wrong ones, at the limits of every field and at random. Whatever comes: no 5xx, only
statuses, media types and bodies that the description has, and nothing accepted that it forbids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks

import tiny_models
from embedding_models import write_embedding_model
from live_server import LiveServer
from mlops.serving.http import HTTPSettings, RunnerHost, ServiceInfo
from mlops.serving.http.openapi import Features, describe_api
from mlops.serving.http.operations import Offer
from mlops.serving.runner import MLXModelRunner
from tool_models import write_tool_model

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
TEXT_PATHS = ("/predict", "/v1/completions", "/v1/chat/completions")
MAX_TOKENS = 6
"""The most that a test asks for; what the description allows would take minutes."""


class Doubled(MLXModelRunner):
    """A custom model."""

    def _load_mlx_model(self) -> Any:
        return None

    def _mlx_predict(self, input_data: Any) -> Any:
        return [input_data, input_data]


def described(title: str, *offers: Offer, has_keys: bool = False) -> Any:
    """What schemathesis makes of the description."""
    document = describe_api(Features(title, frozenset(offers), has_keys))
    config = {"generation": {"mode": "all", "deterministic": True}}
    return schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict(config))


@contextlib.contextmanager
def serving(
    runner: MLXModelRunner, http_settings: HTTPSettings | None = None, model_type: str = "mlx"
) -> Iterator[str]:
    """The address of a service that runs until the block ends."""
    info = ServiceInfo("my_service", model_type=model_type)
    with LiveServer(RunnerHost(lambda: runner), info, http_settings) as server:
        yield server.url


@pytest.fixture(scope="module")
def text_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("models")
    base = write_tool_model(folder / "base")
    support, _ = [
        tiny_models.write_lora_adapter(folder / name, base) for name in ("support", "final")
    ]
    runner = MLXModelRunner(str(base), adapters={"support": str(support)})
    with serving(runner, HTTPSettings(enable_runtime_adapters=True, adapter_folder=folder)) as url:
        yield url


@pytest.fixture(scope="module")
def embedding_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_embedding_model(tmp_path_factory.mktemp("embedding"))
    with serving(MLXModelRunner(str(folder))) as url:
        yield url


@pytest.fixture(scope="module")
def custom_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(Doubled(tmp_path_factory.mktemp("model")), None, "custom") as url:
        yield url


@pytest.fixture(scope="module")
def locked_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    locked = HTTPSettings(api_keys=("0123456789abcdef",))
    with serving(Doubled(tmp_path_factory.mktemp("model")), locked, "custom") as url:
        yield url


few = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
of_text = described("text", *(set(Offer) - {Offer.CUSTOM}))
of_embeddings = described("embeddings", Offer.EMBEDDINGS).include(path="/v1/embeddings")
of_custom = described("custom", Offer.CUSTOM, Offer.METRICS)
of_locked = described("locked", Offer.CUSTOM, Offer.METRICS, has_keys=True)


@of_text.parametrize()
@few
def test_a_language_model(case: schemathesis.Case, text_url: str) -> None:
    if case.path in TEXT_PATHS and isinstance(case.body, dict):
        ask_for_little(case.body)
    case.call_and_validate(base_url=text_url, checks=CHECKS)


@of_embeddings.parametrize()
@few
def test_an_embedding_model(case: schemathesis.Case, embedding_url: str) -> None:
    case.call_and_validate(base_url=embedding_url, checks=CHECKS)


@of_custom.parametrize()
@few
def test_a_custom_model(case: schemathesis.Case, custom_url: str) -> None:
    case.call_and_validate(base_url=custom_url, checks=CHECKS)


@of_locked.parametrize()
@few
def test_without_a_key(case: schemathesis.Case, locked_url: str) -> None:
    # An open path is open for its own method alone: another one gets 401, not 405.
    others = [check for check in CHECKS if check is not checks.unsupported_method]
    case.call_and_validate(base_url=locked_url, checks=[*others, checks.ignored_auth])


def ask_for_little(body: dict[str, Any]) -> None:
    """Make a request cheap, and its fields fit together; what is wrong in one stays wrong."""
    given = [
        name for name in ("max_tokens", "max_completion_tokens") if type(body.get(name)) is int
    ]
    for name in given:
        body[name] = min(body[name], MAX_TOKENS)
    if len(given) == 2 and min(body[name] for name in given) > 0:
        del body["max_completion_tokens"]  # the two do not go together
    if body.get("logprobs") is False and type(body.get("top_logprobs")) is int:
        body["logprobs"] = True  # the two go together
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = MAX_TOKENS
