"""Adapters at run time beside mlx-lm's own: same logits, same tokens, and the base untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import GenerationRequest, GenerationResult, LoadedModel
from mlops.errors import PackagingError

PROMPT = (72, 101, 108, 108, 111)
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_language_model(tmp_path_factory.mktemp("base"))


def logits(model: Any) -> Any:
    import mlx.core as mx

    return np.array(model(mx.array([PROMPT])).astype(mx.float32))


def our_logits(loaded: LoadedModel, adapter: str | None) -> Any:
    def run() -> Any:
        with loaded.adapters.applied(adapter):
            return logits(loaded.model)

    return engine.run_in_owner(run)


def their_model(base: Path, adapter: Path) -> Any:
    """The model with mlx-lm's own unfused adapter, in float32."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    return load_adapters(load_model(base)[0], str(adapter))


def their_logits(base: Path, adapter: Path) -> Any:
    return engine.run_in_owner(lambda: logits(their_model(base, adapter)))


def load(base: Path, **adapters: Path) -> LoadedModel:
    return engine.load_model(
        base, adapters={name: recognise(path) for name, path in adapters.items()}
    )


def tokens(loaded: LoadedModel, *adapters: str | None) -> list[tuple[int, ...]]:
    requests = [GenerationRequest(PROMPT, max_tokens=16, adapter=name) for name in adapters]
    results = engine.generate(loaded, requests)
    return [result.tokens for result in results if isinstance(result, GenerationResult)]


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("llama", {}),
        ("llama", {"keys": ATTENTION, "num_layers": 1, "scale": 20.0}),
        ("llama", {"keys": ["self_attn.q_proj", "lm_head", "model.embed_tokens"]}),
        ("llama", {"dora": True}),
        ("qwen3", {"rank": 8}),
        ("qwen2", {"dora": True}),
        ("gemma3_text", {}),
        ("gemma3_text", {"keys": ["self_attn.q_proj", "model.embed_tokens"]}),
        ("gemma3_text", {"keys": ["self_attn.q_proj", "model.embed_tokens"], "dora": True}),
        ("mixtral", {}),
    ],
)
def test_an_adapter_equals_mlx_lms_own(
    tmp_path: Path, architecture: str, arguments: dict[str, Any]
) -> None:
    base = tiny_models.write_language_model(
        tmp_path / "base",
        architecture=architecture,
        tie_word_embeddings=architecture.startswith("gemma"),
    )
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base, **arguments)
    loaded = load(base, style=adapter)
    ours, theirs = our_logits(loaded, "style"), their_logits(base, adapter)
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-4)
    assert np.abs(ours - our_logits(loaded, None)).max() > 1e-3

    def generate_theirs() -> tuple[int, ...]:
        from mlx_lm import stream_generate

        model = their_model(base, adapter)
        found = stream_generate(model, loaded.tokenizer, list(PROMPT), max_tokens=16)
        return tuple(response.token for response in found if response.finish_reason != "stop")

    assert tokens(loaded, "style") == [engine.run_in_owner(generate_theirs)]


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_a_quantized_base(tmp_path: Path, dora: bool) -> None:
    base = tiny_models.write_language_model(tmp_path / "base", quantize_bits=4)
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base, dora=dora)
    theirs = their_logits(base, adapter)
    for budget in (None, 0):
        loaded = engine.load_model(
            base, adapters={"style": recognise(adapter)}, memory_budget_bytes=budget
        )
        np.testing.assert_allclose(our_logits(loaded, "style"), theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_peft_adapter_equals_the_same_one_in_mlx_lms_form(
    tmp_path: Path, base: Path, dora: bool, use_rslora: bool
) -> None:
    import mlx.core as mx

    rank, alpha = 4, 8.0
    peft = tiny_models.write_peft_adapter(
        tmp_path / "peft", base, rank=rank, alpha=alpha, dora=dora, use_rslora=use_rslora
    )

    def rewrite() -> Path:
        weights = {}
        for key, array in mx.load(str(peft / "adapter_model.safetensors")).items():
            name, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
            ending = {"A.weight": "lora_a", "B.weight": "lora_b", "magnitude_vector": "m"}[kind]
            weights[f"{name}.{ending}"] = array if ending == "m" else array.T
        folder = tmp_path / "mlx"
        folder.mkdir()
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
        config = {
            "fine_tune_type": "dora" if dora else "lora",
            "num_layers": -1,
            "lora_parameters": {
                "rank": rank,
                "scale": alpha / rank**0.5 if use_rslora else alpha / rank,
                "dropout": 0.0,
                "keys": ATTENTION,
            },
            "model": str(base),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    mlx = engine.run_in_owner(rewrite)
    loaded = load(base, peft=peft, mlx=mlx)
    np.testing.assert_array_equal(our_logits(loaded, "peft"), our_logits(loaded, "mlx"))
    np.testing.assert_allclose(
        our_logits(loaded, "peft"), their_logits(base, mlx), atol=2e-5, rtol=2e-4
    )


def test_a_peft_adapter_with_patterns(tmp_path: Path, base: Path) -> None:
    plain = tiny_models.write_peft_adapter(tmp_path / "plain", base)
    patterned = tiny_models.write_peft_adapter(
        tmp_path / "patterned", base, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 1.0}
    )
    loaded = load(base, plain=plain, patterned=patterned)
    assert np.abs(our_logits(loaded, "plain") - our_logits(loaded, "patterned")).max() > 1e-4


def test_the_base_is_bit_identical_beside_adapters(tmp_path: Path, base: Path) -> None:
    adapters = {
        f"a{n}": tiny_models.write_lora_adapter(tmp_path / str(n), base, seed=n, dora=n == 2)
        for n in range(3)
    }
    alone, among = load(base), load(base, **adapters)
    before = our_logits(alone, None)
    np.testing.assert_array_equal(our_logits(among, None), before)
    mixed = ["a0", None, "a1", "a2", None, "a0"]
    together = tokens(among, *mixed)
    assert together == [tokens(among, name)[0] for name in mixed]
    assert together[1] == tokens(alone, None)[0]
    assert len(set(together)) == 4, "the adapters do not answer differently"
    np.testing.assert_array_equal(our_logits(among, None), before)


def test_the_base_is_back_after_a_failure(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(base, style=tiny_models.write_lora_adapter(tmp_path / "adapter", base))
    before = our_logits(loaded, None)
    with monkeypatch.context() as patch:
        patch.setattr("mlops.engine.generation.make_sampler", lambda _: 1 / 0)
        (result,) = engine.generate(loaded, [GenerationRequest(PROMPT, adapter="style")])
    assert isinstance(result, Exception)
    np.testing.assert_array_equal(our_logits(loaded, None), before)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    bigger = tiny_models.write_language_model(tmp_path / "bigger", hidden=64)
    deeper = tiny_models.write_language_model(tmp_path / "deeper", layers=3)
    for other in (bigger, deeper):
        adapter = tiny_models.write_lora_adapter(tmp_path / f"for-{other.name}", other)
        with pytest.raises(PackagingError):
            load(base, style=adapter)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base, zero=True)
    with pytest.raises(PackagingError, match="changes nothing"):
        load(base, style=adapter)


def test_a_model_is_no_adapter(tmp_path: Path, base: Path) -> None:
    with pytest.raises(PackagingError, match="not an adapter"):
        load(base, style=base)


def test_a_tensor_that_nothing_uses_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base)
    checkpoint = recognise(adapter)

    def add_a_tensor() -> None:
        import mlx.core as mx

        path = adapter / "adapters.safetensors"
        tensors = {name: array + 0 for name, array in mx.load(str(path)).items()}
        mx.eval(tensors)
        tensors["model.layers.0.extra.lora_a"] = mx.zeros((2, 2))
        mx.save_safetensors(str(path), tensors)

    engine.run_in_owner(add_a_tensor)
    with pytest.raises(PackagingError, match="nothing uses"):
        engine.load_model(base, adapters={"style": checkpoint})
