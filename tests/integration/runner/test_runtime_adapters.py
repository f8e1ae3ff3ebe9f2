"""Embeddings and changing adapters through the runner and its routes, on real parts."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import tiny_models
from embedding_models import lone_vector, write_embedding_model
from mlops import engine
from mlops.engine import EngineConfig
from mlops.errors import (
    AdapterNotFoundError,
    EngineError,
    EngineShutdownError,
    IntegrityError,
    InvalidRequestError,
    PackagingError,
)
from mlops.registry import resolve
from mlops.serving.bentoml.packager import package_model
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.runner import MLXModelRunner
from mlops.serving.runner.base import AdapterRunner, EmbeddingRunner

TIMEOUT_S = 60.0
ASK = {"prompt": "Hello", "max_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_language_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters `one` and `two`, one that fits another base, and a damaged one."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two"), 1):
        tiny_models.write_lora_adapter(folder / name, base, seed=seed)
    other = tiny_models.write_language_model(folder / "other", hidden=64)
    tiny_models.write_lora_adapter(folder / "foreign", other)
    tiny_models.write_lora_adapter(folder / "zero", base, zero=True)
    tiny_models.write_lora_adapter(folder / "linked", base)
    weights = folder / "linked" / "adapters.safetensors"
    weights.rename(folder.parent / "outside.safetensors")
    weights.symlink_to(folder.parent / "outside.safetensors")
    return folder


@pytest.fixture
def runner(base: Path) -> Iterator[MLXModelRunner]:
    one = MLXModelRunner(base)
    one.load_model()
    yield one
    one.unload_model()


@pytest.fixture
def client(runner: MLXModelRunner, adapters: Path) -> Iterator[TestClient]:
    with serving(runner, adapters) as one:
        yield one


def serving(runner: MLXModelRunner, folder: Path | None = None) -> TestClient:
    host = RunnerHost(lambda: runner)
    host.start()
    host._loading_ended.result(TIMEOUT_S)
    settings = HTTPSettings(enable_runtime_adapters=True, adapter_folder=folder)
    return TestClient(create_app(Served(host, ServiceInfo("tiny"), settings)))


def text_of(runner: MLXModelRunner, adapter: str | None = None) -> str:
    text = runner.predict({**ASK, "adapter": adapter})["prediction"]
    assert isinstance(text, str)
    return text


def load(client: TestClient, name: str, path: str, **fields: Any) -> Any:
    return client.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields}
    )


def complete(client: TestClient, model: str) -> Any:
    return client.post("/v1/completions", json={**ASK, "model": model, "temperature": 0})


def test_adapters_come_and_go_over_http(
    client: TestClient, runner: MLXModelRunner, base: Path, adapters: Path
) -> None:
    given = MLXModelRunner(base, adapters={"x": adapters / "one", "y": adapters / "two"})
    one, two, bare = (text_of(given, name) for name in ("x", "y", None))
    assert len({one, two, bare}) == 3
    assert complete(client, "formal").status_code == 404
    assert load(client, "formal", "one").status_code == 200
    assert complete(client, "formal").json()["choices"][0]["text"] == one
    assert load(client, "formal", "two").status_code == 400
    assert complete(client, "formal").json()["choices"][0]["text"] == one
    assert load(client, "formal", "two", load_inplace=True).status_code == 200
    assert complete(client, "tiny:formal").json()["choices"][0]["text"] == two
    listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert listed["formal"]["parent"] == "tiny"
    assert str(adapters) not in json.dumps(listed)
    assert runner.adapter_names == ("formal",)
    assert client.get("/health").json()["adapters"] == ["formal"]
    removed = client.post("/v1/unload_lora_adapter", json={"lora_name": "formal"})
    assert removed.status_code == 200
    assert complete(client, "formal").status_code == 404
    assert client.get("/health").json()["adapters"] == []
    assert complete(client, "tiny").json()["choices"][0]["text"] == bare


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("foreign", "belongs to another base model"),
        ("zero", "changes nothing"),
        ("other", "not an adapter"),
        ("linked", "leads out of the folder"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    client: TestClient, runner: MLXModelRunner, adapters: Path, path: str, reason: str
) -> None:
    assert load(client, "kept", "one").status_code == 200
    kept = text_of(runner, "kept")
    for name, fields in (("new", {}), ("kept", {"load_inplace": True})):
        response = load(client, name, path, **fields)
        assert response.status_code == 400
        error = response.json()["error"]
        assert reason in error["message"]
        assert error["param"] == "lora_path"
        assert str(adapters.parent) not in error["message"]
    assert runner.adapter_names == ("kept",)
    assert text_of(runner, "kept") == kept


def test_a_folder_with_damaged_weights(client: TestClient, adapters: Path) -> None:
    folder = shutil.copytree(adapters / "one", adapters / "damaged")
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert load(client, "damaged", "damaged").status_code == 400


def test_adapters_of_the_store(bentoml_home: Path, base: Path, adapters: Path) -> None:
    packaged = package_model(
        str(base),
        "tiny",
        model_version="1.0.0",
        adapters={"formal": str(adapters / "one")},
        build_bento=False,
    )
    tag = packaged["adapter_tags"]["formal"]
    runner = MLXModelRunner(packaged["model_tag"])
    runner.load_model()
    digest = resolve(tag).digest
    with serving(runner) as client:
        assert load(client, "a", tag).status_code == 200
        assert load(client, "b", f"{tag}@{digest}").status_code == 200
        other = f"sha256:{'0' * 64}"
        assert "has the digest" in load(client, "c", f"{tag}@{other}").json()["error"]["message"]
        assert load(client, "c", "tiny:1.0.0").status_code == 400
        assert load(client, "c", "nothing:1.0.0").status_code == 400
        assert load(client, "c", str(adapters / "one")).status_code == 400
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert cards["a"]["root"] == tag
        name, _, version = tag.partition(":")
        file = bentoml_home / "models" / name / version / "adapters.safetensors"
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.unlink()
        file.write_bytes(damaged)
        response = load(client, "c", tag)
        assert response.status_code == 400
        assert str(bentoml_home) not in response.text
        assert runner.adapter_names == ("a", "b")
        assert text_of(runner, "a") == text_of(runner, "b")
    with pytest.raises(IntegrityError):
        runner.add_adapter("c", tag)
    runner.unload_model()


def test_requests_under_way_finish_with_what_is_removed(
    runner: MLXModelRunner, adapters: Path
) -> None:
    runner.add_adapter("formal", adapters / "one")
    asked = {"prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "adapter": "formal"}
    expected = runner.predict(asked)["prediction"]

    async def ask_and_remove() -> Any:
        generating = runner.generate(asked)
        await generating.begun()
        await asyncio.to_thread(runner.remove_adapter, "formal")
        with pytest.raises(AdapterNotFoundError):
            await asyncio.to_thread(runner.predict, asked)
        return await generating.prediction()

    assert asyncio.run(ask_and_remove())["prediction"] == expected
    assert runner.statistics()["resident_adapters"]["registered"] == 0


def test_one_of_many_loads_of_a_name_wins(runner: MLXModelRunner, adapters: Path) -> None:
    start = threading.Barrier(6)

    def add(number: int) -> str | None:
        start.wait(TIMEOUT_S)
        path = adapters / ("one" if number % 2 else "two")
        try:
            runner.add_adapter("formal", path)
        except InvalidRequestError:
            return None
        return path.name

    with ThreadPoolExecutor(6) as threads:
        winners = [name for name in threads.map(add, range(6)) if name]
    assert len(winners) == 1
    added = text_of(runner, "formal")
    runner.add_adapter("again", adapters / winners[0])
    assert text_of(runner, "again") == added


def test_what_the_service_was_made_from_stays(base: Path, adapters: Path) -> None:
    runner = MLXModelRunner(adapters / "one")
    runner.load_model()
    name = runner.default_adapter
    assert name is not None
    with pytest.raises(InvalidRequestError, match="stays as it is"):
        runner.remove_adapter(name)
    with pytest.raises(InvalidRequestError, match="stays as it is"):
        runner.add_adapter(name, adapters / "two", replace=True)
    runner.add_adapter("more", adapters / "two")
    assert runner.adapter_names == (name, "more")
    runner.unload_model()


def test_one_that_can_never_fit_leaves_the_old_one(base: Path, adapters: Path) -> None:
    large = tiny_models.write_lora_adapter(adapters / "large", base, rank=64)
    runner = MLXModelRunner(base, engine_config=EngineConfig(adapter_memory_bytes=30_000))
    runner.load_model()
    runner.add_adapter("formal", adapters / "one")
    kept = text_of(runner, "formal")
    with pytest.raises(EngineError, match="raise the limit"):
        runner.add_adapter("formal", large, replace=True)
    assert text_of(runner, "formal") == kept
    runner.unload_model()


def test_a_runner_without_its_model(base: Path, adapters: Path) -> None:
    runner = MLXModelRunner(base)
    assert isinstance(runner, AdapterRunner)
    assert isinstance(runner, EmbeddingRunner)
    assert (runner.adapter_names, runner.can_embed) == ((), False)
    for change in (
        lambda: runner.add_adapter("x", adapters / "one"),
        lambda: runner.remove_adapter("x"),
        lambda: runner.embed("Hello"),
    ):
        with pytest.raises(EngineShutdownError):
            change()


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedding_model(tmp_path_factory.mktemp("embedding") / "tiny-embedding")


@pytest.fixture(scope="module")
def embedder(embedding_model: Path) -> Iterator[MLXModelRunner]:
    one = MLXModelRunner(embedding_model)
    one.load_model()
    yield one
    one.unload_model()


def test_texts_and_token_ids(embedder: MLXModelRunner) -> None:
    assert embedder.can_embed
    texts = ["Hello", "a longer text, with more tokens", "ä€𝄞"]
    result = embedder.embed(texts).result(TIMEOUT_S)
    assert result.prompt_tokens == sum(len(text.encode()) for text in texts)
    ids = [embedder.model.tokenizer.encode(text) for text in texts]
    of_ids = embedder.embed(ids).result(TIMEOUT_S).vectors
    np.testing.assert_array_equal(of_ids, result.vectors)
    alone = [lone_vector(embedder.model.model, one, "lasttoken", True) for one in ids]
    np.testing.assert_allclose(of_ids, alone, atol=2e-5)
    single = embedder.embed(ids[0]).result(TIMEOUT_S).vectors
    np.testing.assert_allclose(single, of_ids[:1], atol=2e-5)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ("", "input"),
        ([], "input"),
        ({}, "input"),
        (None, "input"),
        (3, "input"),
        (["a", ""], "input[1]"),
        (["a", 3], "input[1]"),
        (["a", [1]], "input[1]"),
        ([[1], "a"], "input[1]"),
        ([[1], []], "input[1]"),
        ([1, "a"], "input"),
        ([1, 2.5], "input"),
        ([True], "input"),
        ([[10**30]], "input"),
        ([-1], "input"),
        ([300], "input"),
        ([[[1]]], "input"),
        (["a"] * 2049, "input"),
        ("x" * 1025, "input"),
        ("\ud800", "input"),
    ],
)
def test_inputs_that_are_none(embedder: MLXModelRunner, inputs: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        embedder.embed(inputs).result(TIMEOUT_S)
    assert caught.value.field == field


def test_many_texts_do_not_hold_up_the_next_prompt(embedder: MLXModelRunner) -> None:
    many = embedder.embed(["x" * 1000] * 200)
    few = embedder.embed("Hello").result(TIMEOUT_S)
    assert few.vectors.shape == (1, 32)
    assert many.cancel()
    with pytest.raises(EngineError):
        raise embedder.embed(["a"], adapter="nobody").exception(TIMEOUT_S) or AssertionError
    assert embedder.statistics()["resident_adapters"]["in_use"] == 0


def test_adapters_and_the_bare_base(embedding_model: Path, tmp_path: Path) -> None:
    named = write_embedding_model(tmp_path / "named", is_headless=False)
    adapter = tiny_models.write_lora_adapter(tmp_path / "tone", named)
    runner = MLXModelRunner(adapter, base_model=embedding_model)
    runner.load_model()
    by_default = runner.embed("Hello").result(TIMEOUT_S)
    bare = runner.embed("Hello", adapter="base").result(TIMEOUT_S)
    assert (by_default.adapter, bare.adapter) == ("tone", None)
    assert np.abs(by_default.vectors - bare.vectors).max() > 0.01
    runner.add_adapter("same", adapter)
    same = runner.embed("Hello", adapter="same").result(TIMEOUT_S)
    np.testing.assert_allclose(same.vectors, by_default.vectors, atol=1e-6)
    runner.unload_model()


def test_a_packaged_model_still_gives_embeddings(
    bentoml_home: Path, embedding_model: Path, embedder: MLXModelRunner
) -> None:
    packaged = package_model(str(embedding_model), "vectors", model_version="1.0.0")
    assert packaged["bento_tag"]
    files = bentoml_home / "models" / "vectors" / "1.0.0"
    assert (files / "1_Pooling" / "config.json").exists()
    runner = MLXModelRunner(packaged["model_tag"])
    runner.load_model()
    expected = embedder.embed("Hello").result(TIMEOUT_S).vectors
    np.testing.assert_allclose(runner.embed("Hello").result(TIMEOUT_S).vectors, expected, atol=1e-6)
    runner.unload_model()


def test_openais_client(embedder: MLXModelRunner) -> None:
    from openai import BadRequestError, NotFoundError, OpenAI

    with serving(embedder) as http:
        client = OpenAI(api_key="none", base_url="http://testserver/v1", http_client=http)
        expected = embedder.embed(["Hello", "you"]).result(TIMEOUT_S)
        answer = client.embeddings.create(model="tiny", input=["Hello", "you"])
        np.testing.assert_allclose(
            [one.embedding for one in answer.data], expected.vectors, atol=1e-6
        )
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8
        numbers = client.embeddings.create(
            model="tiny", input=[1, 2, 3], encoding_format="float", dimensions=5
        )
        assert np.linalg.norm(numbers.data[0].embedding) == pytest.approx(1, abs=1e-6)
        large = client.embeddings.create(model="tiny", input=["a"] * 2048)
        assert [one.index for one in large.data] == list(range(2048))
        for wrong in ({"dimensions": 33}, {"input": [""]}, {"input": [9999]}):
            with pytest.raises(BadRequestError):
                client.embeddings.create(**{"model": "tiny", "input": "a", **wrong})
        with pytest.raises(NotFoundError, match="nobody"):
            client.embeddings.create(model="nobody", input="a")


def test_a_model_that_generates_text_only(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported"


def test_paths_for_the_runner_itself(runner: MLXModelRunner) -> None:
    with pytest.raises(PackagingError):
        runner.add_adapter("x", Path("/nothing/here"))
    with pytest.raises(AdapterNotFoundError):
        runner.remove_adapter("x")
    assert engine.BASE_NAME not in runner.adapter_names
