"""Embeddings: what the model's layers give for a text alone, however it is computed."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from embedding_models import lone_vector, write_embedding_model
from engines import TIMEOUT_S, running, with_unfused_adapter
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import EmbeddingRequest, Engine, GenerationRequest, LoadedModel
from mlops.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineError,
    EngineShutdownError,
    InvalidRequestError,
    QueueFullError,
)

LENGTHS = (1, 2, 3, 7, 16, 17, 40, 5, 33, 100, 4, 1)
BUDGET = 32
"""Tokens of a step, in most tests: some texts are over it."""

TEXTS = tuple(
    tuple(int(token) for token in np.random.default_rng(length).integers(0, 256, length))
    for length in LENGTHS
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedding_model(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return engine.load_model(folder)


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with_names = write_embedding_model(
        tmp_path_factory.mktemp("plain"), is_headless=False
    )  # the same weights, as mlx-lm's trainer wants them
    return {
        "lora": tiny_models.write_lora_adapter(tmp_path_factory.mktemp("lora"), with_names),
        "peft": tiny_models.write_peft_adapter(
            tmp_path_factory.mktemp("peft"), with_names, rank=16, seed=3
        ),
    }


@pytest.fixture
def embedder(model: LoadedModel, adapters: dict[str, Path]) -> Iterator[Engine]:
    with running(model, adapters, prefill_tokens=BUDGET) as one:
        yield one
        assert one.statistics()["embeddings"]["running"] == 0


def embed(one: Engine, *texts: tuple[int, ...], **fields: Any) -> Any:
    return one.embed(EmbeddingRequest(texts, **fields)).result(TIMEOUT_S).vectors


def assert_close(vectors: Any, expected: Any) -> None:
    np.testing.assert_allclose(vectors, expected, atol=2e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("mode", ["lasttoken", "mean", "cls"])
def test_each_vector_is_that_of_its_text_alone(
    tmp_path: Path, mode: str, is_normalized: bool, architecture: str
) -> None:
    is_headless = architecture in {"qwen3", "llama"}
    folder = write_embedding_model(
        tmp_path,
        mode=mode,
        is_normalized=is_normalized,
        is_headless=is_headless,
        architecture=architecture,
    )
    plain = write_embedding_model(
        tmp_path / "plain", mode=mode, is_headless=False, architecture=architecture
    )
    reference = engine.load_model(plain).model
    with running(engine.load_model(folder), prefill_tokens=BUDGET) as one:
        result = one.embed(EmbeddingRequest(TEXTS)).result(TIMEOUT_S)
    assert result.prompt_tokens == sum(LENGTHS)
    assert result.vectors.dtype == np.float32
    assert_close(
        result.vectors, [lone_vector(reference, text, mode, is_normalized) for text in TEXTS]
    )


def test_adapters_share_forward_passes_and_are_the_unfused_ones(
    embedder: Engine, adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = write_embedding_model(tmp_path, is_headless=False)
    futures = {
        name: embedder.embed(EmbeddingRequest(TEXTS, adapter=name))
        for name in ("lora", None, "peft")
    }
    unfused = with_unfused_adapter(base, adapters["lora"])
    expected = [lone_vector(unfused, text, "lasttoken", True) for text in TEXTS]
    of_base = [lone_vector(engine.load_model(base).model, one, "lasttoken", True) for one in TEXTS]
    assert_close(futures["lora"].result(TIMEOUT_S).vectors, expected)
    assert_close(futures[None].result(TIMEOUT_S).vectors, of_base)
    of_peft = futures["peft"].result(TIMEOUT_S).vectors
    assert np.abs(of_peft - np.array(of_base)).max() > 0.01
    for text, vector in zip(TEXTS, of_peft, strict=True):
        assert_close(embed(embedder, text, adapter="peft"), [vector])


def test_vectors_can_be_cut(embedder: Engine) -> None:
    whole = embed(embedder, *TEXTS[:4])
    cut = embed(embedder, *TEXTS[:4], dimensions=7)
    expected = whole[:, :7] / np.linalg.norm(whole[:, :7], axis=1, keepdims=True)
    assert_close(cut, expected)
    assert_close(np.linalg.norm(cut, axis=1), 1)
    for dimensions in (0, -1, 33, 10**30):
        with pytest.raises(InvalidRequestError, match="dimensions must be from 1 to 32"):
            embedder.embed(EmbeddingRequest(TEXTS, dimensions=dimensions))


def test_only_lengths_that_the_model_was_trained_for(tmp_path: Path) -> None:
    folder = write_embedding_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "matryoshka_dimensions": [8, 16]}))
    with running(engine.load_model(folder)) as one:
        assert embed(one, (1, 2), dimensions=8).shape == (1, 8)
        with pytest.raises(InvalidRequestError, match="one of 8, 16"):
            one.embed(EmbeddingRequest(((1, 2),), dimensions=7))


def test_streams_go_on_while_thousands_of_texts_are_computed(embedder: Engine) -> None:
    asked = GenerationRequest(tuple(b"Hello"), max_tokens=40, ignore_eos=True)
    alone = embedder.submit(asked).result(TIMEOUT_S).tokens
    many = embedder.embed(EmbeddingRequest(TEXTS * 100))
    few = embedder.embed(EmbeddingRequest(TEXTS[:1]))
    generation = embedder.submit(asked)
    assert few.result(TIMEOUT_S).vectors.shape == (1, 32)
    assert generation.result(TIMEOUT_S).tokens == alone
    assert not many.done()
    assert_close(many.result(TIMEOUT_S).vectors[: len(TEXTS)], embed(embedder, *TEXTS))
    counts = embedder.statistics()["embeddings"]
    assert (counts["requests"], counts["texts"]) == (3, len(TEXTS) * 101 + 1)


def test_prompts_and_texts_share_one_budget_of_tokens(embedder: Engine) -> None:
    seen: list[dict[str, Any]] = []
    release = hold_the_owner()
    try:
        stream = embedder.submit(GenerationRequest((1, 2), max_tokens=12, ignore_eos=True))
        stream.future.add_done_callback(lambda _: seen.append(embedder.statistics()))
        prompt = embedder.submit(GenerationRequest((3,) * 20 * BUDGET, max_tokens=1))
        texts = embedder.embed(EmbeddingRequest(((5,) * BUDGET,) * 20))
    finally:
        release.set()
    texts.result(TIMEOUT_S)
    prompt.result(TIMEOUT_S)
    stream.result(TIMEOUT_S)
    (counts,) = seen  # when the stream ended, neither of the two was computed
    num_tokens = counts["tokens"]["prefill"] + counts["embeddings"]["tokens"]
    assert counts["tokens"]["prefill"] and counts["embeddings"]["tokens"]
    assert num_tokens <= BUDGET * (counts["steps"]["decode"] + 2)


def test_a_request_that_is_given_up_leaves(embedder: Engine) -> None:
    many = embedder.embed(EmbeddingRequest(TEXTS * 200, adapter="lora"))
    assert many.cancel()
    embed(embedder, TEXTS[0])
    wait_until_idle(embedder)
    counts = embedder.statistics()["embeddings"]
    assert (counts["cancelled"], counts["requests"]) == (1, 2)
    assert counts["texts"] < len(TEXTS) * 200
    assert embedder.statistics()["resident_adapters"]["in_use"] == 0


def test_time_that_is_over(embedder: Engine) -> None:
    late = embedder.embed(EmbeddingRequest(TEXTS * 200, deadline_s=time.monotonic() + 0.02))
    with pytest.raises(DeadlineExceededError, match="of 2400 embeddings"):
        late.result(TIMEOUT_S)
    assert embed(embedder, TEXTS[0]).shape == (1, 32)


def test_requests_that_cannot_be(embedder: Engine, model: LoadedModel) -> None:
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        embedder.embed(EmbeddingRequest(TEXTS, adapter="nobody"))
    for texts in ((), ((),), ((1,), ())):
        with pytest.raises(InvalidRequestError, match="at least one token"):
            EmbeddingRequest(texts)
    with running(model, cache_memory_bytes=10_000, prefill_tokens=BUDGET) as small:
        with pytest.raises(InvalidRequestError, match="of 100 tokens needs"):
            small.embed(EmbeddingRequest(TEXTS))
        assert embed(small, TEXTS[0]).shape == (1, 32)


def test_a_full_queue(model: LoadedModel) -> None:
    with running(model, prefill_tokens=BUDGET, max_waiting=2) as one:
        release = hold_the_owner()
        futures = [one.embed(EmbeddingRequest(TEXTS[:2])) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests"):
            one.embed(EmbeddingRequest(TEXTS))
        release.set()
        for future in futures:
            future.result(TIMEOUT_S)


def test_a_long_text_waits_for_the_memory_of_rows(model: LoadedModel) -> None:
    per_token = model.trial.cache_cost.num_bytes(1)
    with running(
        model, prefill_tokens=BUDGET, cache_memory_bytes=120 * per_token, prefix_memory_bytes=0
    ) as one:
        release = hold_the_owner()
        row = one.submit(GenerationRequest((1, 2, 3), max_tokens=60, ignore_eos=True))
        long = one.embed(EmbeddingRequest((TEXTS[9],)))
        later = one.submit(GenerationRequest((4, 5), max_tokens=60, ignore_eos=True))
        release.set()
        assert len(row.result(TIMEOUT_S).tokens) == 60
        assert long.result(TIMEOUT_S).vectors.shape == (1, 32)
        assert len(later.result(TIMEOUT_S).tokens) == 60


def test_more_adapters_than_fit(model: LoadedModel, adapters: dict[str, Path]) -> None:
    with running(model, adapters, prefill_tokens=BUDGET, max_resident_adapters=1) as one:
        futures = [
            one.embed(EmbeddingRequest(TEXTS, adapter=name))
            for name in ("lora", "peft", "lora", None, "peft")
        ]
        generations = [
            one.submit(GenerationRequest((1, 2, 3), max_tokens=5, adapter=name))
            for name in ("peft", "lora", None)
        ]
        found = [future.result(TIMEOUT_S).vectors for future in futures]
        for generation in generations:
            generation.result(TIMEOUT_S)
    assert_close(found[0], found[2])
    assert_close(found[1], found[4])
    assert np.abs(found[0] - found[3]).max() > 0.01


def test_an_adapter_that_is_removed_answers_what_was_asked(
    embedder: Engine, adapters: dict[str, Path]
) -> None:
    expected = embed(embedder, *TEXTS, adapter="lora")
    under_way = embedder.embed(EmbeddingRequest(TEXTS * 20, adapter="lora"))
    embedder.remove_adapter("lora")
    with pytest.raises(AdapterNotFoundError):
        embedder.embed(EmbeddingRequest(TEXTS, adapter="lora"))
    assert_close(under_way.result(TIMEOUT_S).vectors[-len(TEXTS) :], expected)
    embedder.add_adapter("lora", recognise(adapters["lora"]))


def test_a_damaged_adapter_fails_its_requests_only(
    embedder: Engine, adapters: dict[str, Path]
) -> None:
    def verify() -> None:
        raise EngineError("the file has changed")

    embedder.add_adapter("damaged", recognise(adapters["lora"]), verify=verify)
    failing = embedder.embed(EmbeddingRequest(TEXTS, adapter="damaged"))
    going_on = embedder.embed(EmbeddingRequest(TEXTS))
    with pytest.raises(EngineError, match="has changed"):
        failing.result(TIMEOUT_S)
    assert going_on.result(TIMEOUT_S).vectors.shape == (len(TEXTS), 32)


class Failing:
    """A pooler that fails at texts with the token 199."""

    def __init__(self, pooler: Any) -> None:
        self._pooler = pooler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pooler, name)

    def pool(self, inputs: Any) -> Any:
        if any(199 in one for one in inputs):
            raise RuntimeError("no such kernel")
        return self._pooler.pool(inputs)


def test_a_failure_ends_what_it_touched(model: LoadedModel) -> None:
    pooler: Any = Failing(model.pooler)
    with running(dataclasses.replace(model, pooler=pooler), prefill_tokens=4) as one:
        generation = one.submit(GenerationRequest((1, 2), max_tokens=20, ignore_eos=True))
        failing = one.embed(EmbeddingRequest(((199, 199, 1), (1, 2))))
        with pytest.raises(EngineError, match="no such kernel"):
            failing.result(TIMEOUT_S)
        assert embed(one, (1, 2, 3)).shape == (1, 32)
        assert len(generation.result(TIMEOUT_S).tokens) == 20


def test_numbers_that_are_none_are_an_error(tmp_path: Path) -> None:
    loaded = engine.load_model(write_embedding_model(tmp_path))

    def spoil() -> None:
        loaded.model.model.embed_tokens.weight[77] = float("nan")

    engine.run_in_owner(spoil)
    with running(loaded) as one:
        with pytest.raises(EngineError, match="not finite"):
            embed(one, (1, 77))
        assert np.isfinite(embed(one, (1, 76))).all()


def test_closing_ends_and_refuses(model: LoadedModel) -> None:
    one = Engine(model, engine.EngineConfig(prefill_tokens=BUDGET))
    many = one.embed(EmbeddingRequest(TEXTS * 500))
    one.close()
    with pytest.raises(EngineShutdownError):
        many.result(TIMEOUT_S)
    with pytest.raises(EngineShutdownError):
        one.embed(EmbeddingRequest(TEXTS))


def test_closing_lets_requests_finish_when_there_is_time(model: LoadedModel) -> None:
    one = Engine(model, engine.EngineConfig(prefill_tokens=BUDGET))
    few = one.embed(EmbeddingRequest(TEXTS))
    one.close(drain_s=TIMEOUT_S)
    assert few.result(0).vectors.shape == (len(TEXTS), 32)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mode": "max_tokens"}, "max_tokens pooling"),
        ({"mode": "weightedmean_tokens"}, "weightedmean_tokens pooling"),
        ({"kinds": ["Transformer", "Pooling", "Dense", "Normalize"]}, "Dense"),
        ({"kinds": ["Transformer"]}, "Transformer, Pooling"),
    ],
)
def test_a_model_that_wants_more_generates_text_only(
    tmp_path: Path, arguments: Any, reason: str
) -> None:
    loaded = engine.load_model(write_embedding_model(tmp_path, **arguments))
    assert loaded.pooler is None
    assert reason in loaded.no_embeddings
    with running(loaded) as one, pytest.raises(InvalidRequestError, match="gives no embeddings"):
        embed(one, (1, 2))


@pytest.mark.parametrize("content", ["{}", "[", "[[]]", "", "[" * 100_000, '[{"type": 3}]'])
def test_files_that_make_no_sense_are_no_reason_to_fail(tmp_path: Path, content: str) -> None:
    folder = write_embedding_model(tmp_path)
    (folder / "modules.json").write_text(content)
    pooling = recognise(folder).pooling
    assert pooling is not None
    assert pooling.problem


def test_attention_in_both_directions_is_not_computed_wrongly(tmp_path: Path) -> None:
    folder = write_embedding_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    assert "both directions" in engine.load_model(folder).no_embeddings


def test_a_plain_language_model_gives_none(loaded: LoadedModel) -> None:
    assert loaded.pooler is None
    assert "modules.json" in loaded.no_embeddings


def hold_the_owner() -> threading.Event:
    """Keep the owner thread busy until the event is set."""
    release = threading.Event()
    engine.submit_to_owner(release.wait, TIMEOUT_S)
    return release


def wait_until_idle(one: Engine) -> None:
    assert one._idle.wait(TIMEOUT_S)
