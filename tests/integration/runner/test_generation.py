"""Generation beside mlx-lm's own, on tiny random models: same tokens alone and in a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import GenerationRequest, GenerationResult, LoadedModel, Sampling
from mlops.errors import AdapterNotFoundError, DeadlineExceededError, ServiceError

PROMPTS = ["Hello", "a", "The quick brown fox jumps over the lazy dog", "café 🍏 naïve", "1 2 3"]
ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "gpt2"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """Writes and loads a model; the same arguments give the same one again."""
    known: dict[str, LoadedModel] = {}

    def load_once(**arguments: Any) -> LoadedModel:
        key = repr(sorted(arguments.items()))
        if key not in known:
            folder = tiny_models.write_language_model(tmp_path_factory.mktemp("model"), **arguments)
            known[key] = engine.load_model(folder)
        return known[key]

    return load_once


def encode(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    return tuple(engine.run_in_owner(loaded.tokenizer.encode, text))


def ask(loaded: LoadedModel, text: str = "Hello", **fields: Any) -> GenerationRequest:
    return GenerationRequest(encode(loaded, text), **{"max_tokens": 24, **fields})


def answers(loaded: LoadedModel, *requests: GenerationRequest) -> list[GenerationResult]:
    results = engine.generate(loaded, requests)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if isinstance(result, GenerationResult)]


def reference(loaded: LoadedModel, request: GenerationRequest) -> tuple[str, tuple[int, ...], Any]:
    """What mlx-lm itself generates, greedily."""

    def run() -> tuple[str, tuple[int, ...], Any]:
        from mlx_lm import stream_generate

        text, tokens, reason = "", [], None
        for response in stream_generate(
            loaded.model, loaded.tokenizer, list(request.prompt), max_tokens=request.max_tokens
        ):
            text += response.text
            reason = response.finish_reason
            if reason != "stop":
                tokens.append(response.token)
        return text.rstrip("\ufffd"), tuple(tokens), reason

    return engine.run_in_owner(run)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_mlx_lm_alone_and_in_a_batch(
    load: Callable[..., LoadedModel], architecture: str
) -> None:
    loaded = load(architecture=architecture)
    # mlx-lm adds gemma2's mask to scores of another shape.
    assert loaded.can_batch == (architecture != "gemma2")
    requests = [ask(loaded, text, max_tokens=5 + 6 * n) for n, text in enumerate(PROMPTS)]
    expected = [reference(loaded, request) for request in requests]
    together = answers(loaded, *requests)
    alone = [answers(loaded, request)[0] for request in requests]
    for results in (together, alone):
        assert [(r.text, r.tokens, r.finish_reason) for r in results] == expected


def test_usage_and_times(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    (result,) = answers(loaded, ask(loaded, max_tokens=8))
    assert result.prompt_tokens == len(encode(loaded, "Hello"))
    assert (result.completion_tokens, result.finish_reason) == (8, "length")
    assert 0 < result.first_token_ms <= result.total_ms


def test_more_requests_than_one_prefill_takes(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    requests = [ask(loaded, "x" * (1 + 7 * n), max_tokens=3 + n % 5) for n in range(20)]
    expected = [reference(loaded, request)[1] for request in requests]
    assert [result.tokens for result in answers(loaded, *requests)] == expected


def test_a_prompt_longer_than_one_prefill_step(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()
    requests = [ask(loaded, "long " * 40), ask(loaded, "short")]
    expected = [result.tokens for result in answers(loaded, *requests)]
    monkeypatch.setattr("mlops.engine.generation.PREFILL_STEP_TOKENS", 16)
    assert [result.tokens for result in answers(loaded, *requests)] == expected
    assert [answers(loaded, request)[0].tokens for request in requests] == expected


def test_a_seed_gives_the_same_text_whatever_else_runs(load: Callable[..., LoadedModel]) -> None:
    loaded = load()

    def seeded(seed: int) -> GenerationRequest:
        return ask(loaded, "Hi", sampling=Sampling(1.0, top_p=0.95, top_k=200, seed=seed))

    (alone,) = answers(loaded, seeded(1))
    others = [ask(loaded, text, sampling=Sampling(temperature=1.5)) for text in PROMPTS]
    crowded = answers(loaded, others[0], seeded(1), *others[1:], seeded(2), ask(loaded, "Hi"))
    assert crowded[1].tokens == alone.tokens
    assert crowded[-2].tokens != alone.tokens
    assert crowded[-1].tokens == answers(loaded, ask(loaded, "Hi"))[0].tokens


def test_a_stop_text_ends_and_is_cut(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    (whole,) = answers(loaded, ask(loaded, max_tokens=40))
    stop = whole.text[5:8]
    at = whole.text.index(stop)
    stopping = ask(loaded, max_tokens=40, stop=("never to be seen", stop))
    for results in (answers(loaded, stopping), answers(loaded, stopping, ask(loaded, "other"))):
        assert (results[0].text, results[0].finish_reason) == (whole.text[:at], "stop")
        assert results[0].completion_tokens < 40


class Script:
    """A model that says given bytes, one token each, whatever it is asked."""

    def __init__(self, loaded: LoadedModel, text: bytes) -> None:
        from mlx_lm.tokenizer_utils import _byte_decoder

        letters = {value: letter for letter, value in _byte_decoder().items()}
        convert = loaded.tokenizer.convert_tokens_to_ids
        self.tokens = [convert(letters[value]) for value in text]
        self.layers: list[Any] = []
        self.prompt_tokens: int | None = None

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import ChunkedKVCache

        self.num_done = 0
        return [ChunkedKVCache(16)]  # a kind that mlx-lm cannot batch

    def __call__(self, ids: Any, cache: Any) -> Any:
        import mlx.core as mx

        logits = mx.zeros((1, ids.shape[1], 300))
        logits[:, -1, self.tokens[min(self.num_done, len(self.tokens) - 1)]] = 1.0
        self.num_done += 1
        return logits


@pytest.mark.parametrize("num_bytes", range(1, 13))
def test_text_is_never_cut_inside_a_character(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    loaded = load()
    said = "né🍏日".encode()
    script = engine.run_in_owner(Script, loaded, said)
    monkeypatch.setattr(loaded, "model", script)
    request = GenerationRequest((1,), max_tokens=min(num_bytes, len(said)))
    (result,) = answers(loaded, request)
    assert result.text == said[:num_bytes].decode("utf-8", "ignore")


def test_an_architecture_that_cannot_be_batched_runs_one_by_one(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlops.engine.batching import can_batch

    loaded = load()
    script = engine.run_in_owner(Script, loaded, b"yes")
    assert not engine.run_in_owner(can_batch, script)
    monkeypatch.setattr(loaded, "model", script)
    monkeypatch.setattr(loaded, "can_batch", False)
    results = answers(loaded, *[GenerationRequest((1,), max_tokens=3)] * 3)
    assert [result.text for result in results] == ["yes"] * 3


def test_nobody_waits_for_a_cancelled_request(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    looks = {"alone": 0, "batch": 0}

    def after_some(name: str) -> Callable[[], bool]:
        def is_cancelled() -> bool:
            looks[name] += 1
            return looks[name] > 10

        return is_cancelled

    (alone,) = answers(loaded, ask(loaded, max_tokens=500, is_cancelled=after_some("alone")))
    batch = answers(
        loaded,
        ask(loaded, max_tokens=500, is_cancelled=after_some("batch")),
        ask(loaded, "other", max_tokens=30),
    )
    for result in (alone, batch[0]):
        assert result.finish_reason == "cancelled"
        assert result.completion_tokens < 12
    assert batch[1].completion_tokens == 30
    assert batch[1].tokens == answers(loaded, ask(loaded, "other", max_tokens=30))[0].tokens


def test_cancelled_before_the_first_token(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    gone = ask(loaded, is_cancelled=lambda: True)
    assert [r.finish_reason for r in answers(loaded, gone)] == ["cancelled"]
    results = answers(loaded, gone, ask(loaded, max_tokens=4), gone)
    assert [r.finish_reason for r in results] == ["cancelled", "length", "cancelled"]


def test_a_deadline_that_is_over(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    late = ask(loaded, max_tokens=500, deadline_s=time.monotonic())
    in_time = ask(loaded, max_tokens=4, deadline_s=time.monotonic() + 1000)
    for requests in ([late], [late, in_time]):
        results = engine.generate(loaded, requests)
        assert isinstance(results[0], DeadlineExceededError)
    assert isinstance(results[1], GenerationResult)


def test_a_failing_model_fails_its_requests_and_the_next_ones_work(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()

    class Broken:
        layers = ()

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(loaded, "model", Broken())
        for requests in ([ask(loaded)], [ask(loaded), ask(loaded, "b")]):
            for result in engine.generate(loaded, requests):
                assert "no such kernel" in str(result)
                assert isinstance(result, Exception)
    assert answers(loaded, ask(loaded))


def test_an_unknown_adapter_is_no_silent_fall_back(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    results = engine.generate(loaded, [ask(loaded, adapter="nope"), ask(loaded)])
    assert isinstance(results[0], AdapterNotFoundError)
    assert isinstance(results[1], GenerationResult)


def logits_of(model: Any, prompt: tuple[int, ...]) -> Any:
    import mlx.core as mx
    import numpy as np

    return np.array(model(mx.array([prompt])).astype(mx.float32))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_computes_the_same_as_float32(
    tmp_path: Path, bits: int, architecture: str
) -> None:
    import numpy as np

    folder = tiny_models.write_language_model(
        tmp_path, architecture=architecture, quantize_bits=bits, dtype="float16"
    )
    loaded = engine.load_model(folder)
    stored = engine.load_model(folder, memory_budget_bytes=0)
    assert loaded.layout == f"float32 (dequantized from {bits}-bit)"
    assert stored.layout == f"{bits}-bit (as stored)"

    def dtypes(model: Any) -> set[str]:
        from mlx.utils import tree_flatten

        return {str(array.dtype) for _, array in tree_flatten(model.parameters())}

    assert engine.run_in_owner(dtypes, loaded.model) == {"mlx.core.float32"}
    assert "mlx.core.uint32" in engine.run_in_owner(dtypes, stored.model)
    prompt = encode(loaded, PROMPTS[2])
    ours, theirs = (engine.run_in_owner(logits_of, m.model, prompt) for m in (loaded, stored))
    np.testing.assert_allclose(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_cast_for_a_cpu(tmp_path: Path, dtype: str) -> None:
    folder = tiny_models.write_language_model(tmp_path, dtype=dtype)
    assert engine.load_model(folder).layout == f"float32 (cast from {dtype})"


def test_what_does_not_fit_stays_as_it_is_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_models.write_language_model(tmp_path, quantize_bits=4)
    with caplog.at_level(logging.WARNING):
        loaded = engine.load_model(folder, memory_budget_bytes=1000)
    assert loaded.layout == "4-bit (as stored)"
    assert "about ten times slower" in caplog.text
    assert answers(loaded, ask(loaded))[0].completion_tokens == 24


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path, with_tokenizer=False)
    with pytest.raises(ServiceError, match="has no tokenizer") as caught:
        engine.load_model(folder)
    assert caught.value.operation == "load_model"


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ServiceError, match=r"tokenizer of .* cannot be loaded"):
        engine.load_model(folder)


def test_only_language_models_are_loaded(tmp_path: Path) -> None:
    base = tiny_models.write_language_model(tmp_path / "base")
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base)
    with pytest.raises(ServiceError, match="serves MLX and Transformers language models"):
        engine.load_model(recognise(adapter))


@pytest.mark.parametrize("num_rows", [2, 4])
def test_a_batch_that_would_compute_something_else_is_not_made(
    load: Callable[..., LoadedModel], num_rows: int
) -> None:
    loaded = load(architecture="gemma2", hidden=64)
    requests = [ask(loaded, text) for text in PROMPTS[:num_rows]]
    expected = [reference(loaded, request)[1] for request in requests]
    assert [result.tokens for result in answers(loaded, *requests)] == expected
