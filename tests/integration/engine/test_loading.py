"""From a folder to a model in memory: its layout, what is refused, and models that run alone."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from engines import ask_all, running
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import GenerationRequest, LoadedModel
from mlops.errors import ServiceError


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return engine.load_model(tiny_models.write_language_model(tmp_path_factory.mktemp("model")))


class Script:
    """A model that says given bytes, one token each, whatever it is asked."""

    def __init__(self, loaded: LoadedModel, text: bytes) -> None:
        from mlx_lm.tokenizer_utils import _byte_decoder

        letters = {value: letter for letter, value in _byte_decoder().items()}
        convert = loaded.tokenizer.convert_tokens_to_ids
        self.tokens = [convert(letters[value]) for value in text]
        self.layers: list[Any] = []

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import ChunkedKVCache

        self.num_done = 0
        return [ChunkedKVCache(16)]  # a kind that mlx-lm cannot batch

    def __call__(self, ids: Any, cache: Any) -> Any:
        import mlx.core as mx

        rows, num_tokens = ids.shape
        cache[0].update_and_fetch(*[mx.zeros((rows, 1, num_tokens, 4))] * 2)
        logits = mx.zeros((rows, num_tokens, 300))
        logits[:, -1, self.tokens[min(self.num_done, len(self.tokens) - 1)]] = 1.0
        self.num_done += 1
        return logits


def scripted(loaded: LoadedModel, text: bytes) -> LoadedModel:
    from mlops.engine.batching import try_out

    script: Any = engine.run_in_owner(Script, loaded, text)
    return dataclasses.replace(loaded, model=script, trial=engine.run_in_owner(try_out, script))


@pytest.mark.parametrize("num_bytes", range(1, 13))
def test_text_is_never_cut_inside_a_character(loaded: LoadedModel, num_bytes: int) -> None:
    said = "né🍏日".encode()
    with running(scripted(loaded, said)) as one:
        (result,) = ask_all(one, GenerationRequest((1,), max_tokens=min(num_bytes, len(said))))
    assert result.text == said[:num_bytes].decode("utf-8", "ignore")


def test_an_architecture_that_cannot_be_batched_runs_one_by_one(loaded: LoadedModel) -> None:
    alone = scripted(loaded, b"yes")
    assert not alone.can_batch
    with running(alone) as one:
        results = ask_all(one, *[GenerationRequest((1,), max_tokens=3)] * 3)
        counts = one.statistics()
    assert [result.text for result in results] == ["yes"] * 3
    assert (counts["max_rows"], counts["batch_sizes"]) == (1, {"1": 9})


@pytest.mark.parametrize("hidden", [32, 64])
def test_one_that_cannot_be_batched_says_so(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    hidden: int,
) -> None:
    # Left as it is, mlx-lm adds its mask to scores of another shape.
    monkeypatch.setattr("mlops.engine.grouped_masks.fit_masks", lambda model, architecture: None)
    folder = tiny_models.write_language_model(tmp_path, architecture="gemma2", hidden=hidden)
    with caplog.at_level(logging.WARNING):
        assert not engine.load_model(folder).can_batch
    assert "mlx-lm cannot batch gemma2 models" in caplog.text


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
    prompt = tuple(loaded.tokenizer.encode("The quick brown fox jumps over the lazy dog"))
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
    with running(loaded) as one:
        assert ask_all(one, GenerationRequest((1, 2), max_tokens=4))[0].completion_tokens == 4


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
