"""The guide's runners: loaded from folders and tags, asked from many threads, unloaded for good."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from mlops import engine
from mlops.errors import (
    AdapterNotFoundError,
    BentoMLError,
    DeadlineExceededError,
    EngineError,
    EngineShutdownError,
    IntegrityError,
    InvalidRequestError,
    PackagingError,
    QueueFullError,
    ServiceError,
)
from mlops.serving.bentoml.runner import LoRAModelRunner, MLXModelRunner
from mlops.serving.runner import Runner
from mlops.serving.runner.base import TextRunner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_language_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "checkpoint_epoch_2"
    return tiny_models.write_lora_adapter(folder, model)


@pytest.fixture(scope="module")
def runner(model: Path) -> MLXModelRunner:
    return MLXModelRunner(model)


@pytest.fixture(scope="module")
def lora(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRAModelRunner:
    other = tiny_models.write_peft_adapter(tmp_path_factory.mktemp("adapters") / "peft", model)
    return LoRAModelRunner(adapter, adapters={"other": other})


def test_the_guides_steps(model: Path) -> None:
    runner = MLXModelRunner(model_path=str(model), enable_mps=True, enable_unified_memory=True)
    assert isinstance(runner, Runner)
    assert not runner.is_loaded
    assert runner.get_memory_usage()["total_mb"] >= 0
    runner.load_model()
    runner.load_model()
    assert runner.is_loaded
    result = runner.predict({"input": "test", "max_tokens": 12})
    assert isinstance(result["prediction"], str)
    assert result["mlx_optimized"] is True
    assert result["model_type"] == "mlx"
    usage = result["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 12
    assert (result["finish_reason"], result["adapter"]) == ("length", None)
    assert 0 < result["timings"]["first_token_ms"] <= result["timings"]["total_ms"]
    json.dumps(result)
    memory = runner.get_memory_usage()
    assert memory["total_mb"] == memory["active_mb"] + memory["cache_mb"]
    assert 0 < memory["active_mb"] <= memory["peak_mb"]
    assert memory["mlx_available"] is True
    runner.unload_model()
    runner.unload_model()
    assert not runner.is_loaded
    with pytest.raises(EngineShutdownError, match="call load_model"):
        _ = runner.model


def test_a_prediction_loads_the_model(model: Path) -> None:
    runner = MLXModelRunner(model)
    assert runner.predict("Hello")["usage"]["completion_tokens"] == 256
    assert runner.is_loaded
    assert runner.describe()["layout"] == "float32 (as stored)"


def test_text_input_and_messages_are_a_conversation_and_prompt_is_not(
    runner: MLXModelRunner,
) -> None:
    short = {"max_tokens": 8}
    as_text = runner.predict({"text": "Hello", **short})
    as_input = runner.predict({"input": "Hello", **short})
    messages = [{"role": "user", "content": "Hello"}]
    as_messages = runner.predict({"messages": messages, **short})
    raw = runner.predict({"prompt": "<|start|>user\nHello<|end|>\n<|start|>assistant\n", **short})
    as_prompt = runner.predict({"prompt": "Hello", **short})
    texts = {one["prediction"] for one in (as_text, as_input, as_messages, raw)}
    assert len(texts) == 1
    assert as_prompt["usage"]["prompt_tokens"] == len("Hello")
    assert as_text["usage"]["prompt_tokens"] > len("Hello")


def test_without_chat_template_only_messages_are_refused(tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "plain")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    runner = MLXModelRunner(folder)
    answer = runner.predict({"text": "Hello", "max_tokens": 2})
    assert answer["usage"]["prompt_tokens"] == len("Hello")
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        runner.predict({"messages": [{"role": "user", "content": "Hello"}]})
    assert caught.value.field == "messages"


def test_a_template_that_refuses_is_a_bad_request(tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "strict")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        MLXModelRunner(folder).predict("Hello")


@pytest.mark.parametrize(
    ("request_data", "field"),
    [
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "x", "max_tokens": 1024}, "max_tokens"),
        ({"text": ""}, "text"),
        ({"text": "a", "temperature": "hot"}, "temperature"),
        ({"text": "a", "max_length": 3}, "max_length"),
    ],
)
def test_a_request_the_model_cannot_hold_names_the_field(
    runner: MLXModelRunner, request_data: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        runner.predict(request_data)
    assert caught.value.field == field


def test_the_default_max_tokens_gives_way_to_a_long_prompt(runner: MLXModelRunner) -> None:
    usage = runner.predict({"prompt": "x" * 1000})["usage"]
    assert usage["total_tokens"] <= 1024


def test_a_token_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path, vocab=200)
    runner = MLXModelRunner(folder)
    with pytest.raises(InvalidRequestError, match="does not know"):
        runner.predict({"text": "Hello"})


def test_one_bad_request_spoils_no_batch(runner: MLXModelRunner) -> None:
    good = {"prompt": "Hello", "max_tokens": 6}
    answers = runner.predict_batch(
        [good, {"text": ""}, good, {"prompt": "x", "adapter": "nope"}, {"prompt": "x" * 3000}, good]
    )
    assert [type(answer).__name__ for answer in answers] == [
        "dict",
        "InvalidRequestError",
        "dict",
        "AdapterNotFoundError",
        "PromptTooLongError",
        "dict",
    ]
    alone = runner.predict(good)["prediction"]
    assert {answers[n]["prediction"] for n in (0, 2, 5)} == {alone}  # type: ignore[index]
    assert runner.predict_batch([]) == []


def test_eight_threads_at_once(runner: MLXModelRunner) -> None:
    requests = [{"prompt": "abc"[: n % 3 + 1], "max_tokens": 8 + n} for n in range(24)]
    expected = [runner.predict(request)["prediction"] for request in requests]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda one: runner.predict(one)["prediction"], requests))
    assert found == expected


def test_a_request_given_up_ends(runner: MLXModelRunner) -> None:
    runner.load_model()
    answer = runner.generate({"prompt": "x", "max_tokens": 900})
    while not runner.statistics()["running"]:
        engine.run_in_owner(int)
    answer.cancel()
    answer.cancel()
    prediction = asyncio.run(answer.prediction())
    assert prediction["finish_reason"] == "cancelled"
    assert prediction["usage"]["completion_tokens"] < 900
    engine.run_in_owner(int)
    assert runner.statistics()["running"] == 0


def test_an_answer_raises_what_is_wrong_with_its_request(model: Path) -> None:
    runner = MLXModelRunner(model)
    with pytest.raises(EngineShutdownError, match="call load_model"):
        runner.generate({"prompt": "x"})
    assert runner.statistics() == {}
    runner.load_model()
    for fields, error in (
        ({"prompt": "x", "max_tokens": 0}, InvalidRequestError),
        ({"prompt": "x" * 3000}, InvalidRequestError),
        ({"prompt": "x", "adapter": "nope"}, AdapterNotFoundError),
    ):
        with pytest.raises(error):
            asyncio.run(runner.generate(fields).prediction())
    late = runner.generate({"prompt": "x"}, deadline_s=time.monotonic())
    with pytest.raises(DeadlineExceededError):
        asyncio.run(late.prediction())


def test_statistics(model: Path) -> None:
    runner = MLXModelRunner(model)
    assert isinstance(runner, TextRunner)
    runner.predict_batch([{"prompt": "Hello", "max_tokens": 4}] * 3)
    counts = runner.statistics()
    json.dumps(counts)
    assert counts["requests"] == {"submitted": 3, "finished": {"length": 3}}
    assert counts["tokens"]["completion"] == 12
    assert (counts["running"], counts["waiting"]) == (0, 0)
    runner.unload_model()
    assert runner.statistics() == {}


def test_token_ids_as_prompt(runner: MLXModelRunner) -> None:
    ask = {"max_tokens": 8}
    ids = runner.predict({"prompt": list(b"Hello"), **ask})
    assert ids["usage"]["prompt_tokens"] == len("Hello")
    table = runner.model.tokenizer.encode("Hello")
    assert (
        runner.predict({"prompt": table, **ask})["prediction"]
        == runner.predict({"prompt": "Hello", **ask})["prediction"]
    )
    with pytest.raises(InvalidRequestError, match="does not know") as caught:
        runner.predict({"prompt": [1, 10**6], **ask})
    assert caught.value.field == "prompt"


def test_several_choices(runner: MLXModelRunner) -> None:
    ask = {"prompt": "Hello", "max_tokens": 8, "temperature": 1.0, "seed": 3}
    answer = runner.predict({**ask, "n": 3, "logprobs": 1})
    json.dumps(answer)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    alone = [runner.predict({**ask, "seed": 3 + n})["prediction"] for n in range(3)]
    assert [choice["text"] for choice in choices] == alone
    assert len(set(alone)) == 3
    assert answer["prediction"] == alone[0]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len("Hello")
    assert usage["completion_tokens"] == sum(len(choice["logprobs"]) for choice in choices)
    assert answer["logprobs"] == choices[0]["logprobs"]
    assert {len(entry["top"]) for choice in choices for entry in choice["logprobs"]} == {1}
    assert "choices" not in runner.predict(ask)


def test_choices_that_find_no_place_take_the_others_with_them(model: Path) -> None:
    runner = MLXModelRunner(model, engine_config=engine.EngineConfig(max_waiting=2, max_rows=1))
    one, two = {"prompt": "x", "max_tokens": 2}, {"prompt": "x", "max_tokens": 900, "n": 2}
    first, second = engine.run_in_owner(runner.predict_batch, [one, two])
    assert first["finish_reason"] == "length"
    assert isinstance(second, QueueFullError)
    requests = runner.statistics()["requests"]
    assert requests == {"submitted": 2, "finished": {"cancelled": 1, "length": 1}}


def test_requests_under_way_finish_before_the_model_is_unloaded(model: Path) -> None:
    runner = MLXModelRunner(model)
    runner.load_model()
    answers = [runner.generate({"prompt": text, "max_tokens": 200}) for text in "abc"]
    while runner.statistics()["requests"]["submitted"] < len(answers):
        engine.run_in_owner(int)
    runner.unload_model()
    assert not runner.is_loaded
    predictions = [asyncio.run(answer.prediction()) for answer in answers]
    assert {answer["usage"]["completion_tokens"] for answer in predictions} == {200}
    with pytest.raises(EngineShutdownError):
        runner.generate({"prompt": "d"})


def memory_at_rest(model: Path, watcher: MLXModelRunner) -> float:
    """What is in use without a model, MLX's own constants of the first one among it."""
    runner = MLXModelRunner(model)
    runner.predict({"prompt": "a", "max_tokens": 1})
    runner.unload_model()
    del runner
    return memory_when_settled(watcher)


def memory_when_settled(watcher: MLXModelRunner) -> float:
    """MB in use once the owner thread has let go of what was forgotten, and Python of the rest."""
    for _ in range(3):  # steps and the release are queued one after the other
        engine.run_in_owner(int)
        gc.collect()
    return float(watcher.get_memory_usage()["active_mb"])


def test_a_runner_may_be_forgotten_while_it_answers(model: Path) -> None:
    watcher = MLXModelRunner(model)
    before = memory_at_rest(model, watcher)
    runner = MLXModelRunner(model)
    runner.load_model()
    answer = runner.generate({"prompt": "a", "max_tokens": 200})
    del runner
    assert asyncio.run(answer.prediction())["usage"]["completion_tokens"] == 200
    del answer
    assert memory_when_settled(watcher) <= before


def test_memory_comes_back(model: Path) -> None:
    runner = MLXModelRunner(model)

    def cycle() -> float:
        runner.load_model()
        runner.predict({"prompt": "Hello", "max_tokens": 4})
        loaded = runner.get_memory_usage()["active_mb"]
        runner.unload_model()
        return float(loaded)

    loaded = cycle()
    before = runner.get_memory_usage()["total_mb"]
    for _ in range(20):
        cycle()
    after = runner.get_memory_usage()["total_mb"]
    assert after - before <= 0.05 * (loaded - before)


def test_a_forgotten_runner_gives_its_memory_back(model: Path) -> None:
    watcher = MLXModelRunner(model)
    before = memory_at_rest(model, watcher)
    runner = MLXModelRunner(model)
    runner.load_model()
    assert watcher.get_memory_usage()["active_mb"] > before
    del runner
    assert memory_when_settled(watcher) <= before


def test_lora_answers_with_its_adapter_by_default(lora: LoRAModelRunner, model: Path) -> None:
    ask = {"prompt": "Hello", "max_tokens": 12}
    default = lora.predict(ask)
    assert (default["model_type"], default["adapter"]) == ("lora", "checkpoint_epoch_2")
    assert (
        lora.predict({**ask, "adapter": "checkpoint_epoch_2"})["prediction"]
        == (default["prediction"])
    )
    other = lora.predict({**ask, "adapter": "other"})
    base = MLXModelRunner(model).predict(ask)
    for name in ("base", None):
        answer = lora.predict({**ask, "adapter": name})
        assert (answer["prediction"], answer["adapter"]) == (base["prediction"], None)
    assert len({one["prediction"] for one in (default, other, base)}) == 3
    with pytest.raises(AdapterNotFoundError, match=r"'nope'; this model has 'checkpoint_epoch_2'"):
        lora.predict({**ask, "adapter": "nope"})
    assert lora.describe()["adapters"] == ["checkpoint_epoch_2", "other"]


def test_adapters_in_one_batch(lora: LoRAModelRunner) -> None:
    names = ["other", "base", "checkpoint_epoch_2", None, "other"]
    asks = [{"prompt": "Hello", "max_tokens": 12, "adapter": name} for name in names]
    together = lora.predict_batch(asks)
    alone = [lora.predict(ask)["prediction"] for ask in asks]
    assert [one["prediction"] for one in together if isinstance(one, dict)] == alone


def test_a_base_given_by_hand(tmp_path: Path, model: Path) -> None:
    adapter = tiny_models.write_lora_adapter(tmp_path / "a", model, base_reference="./not-here")
    with pytest.raises(PackagingError, match="pass base_model="):
        LoRAModelRunner(adapter).load_model()
    runner = LoRAModelRunner(adapter, base_model=model)
    assert runner.predict({"prompt": "Hi", "max_tokens": 2})["adapter"] == "a"


def test_a_full_model_is_served_as_it_is(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = LoRAModelRunner(model)
    with caplog.at_level(logging.INFO):
        answer = runner.predict({"prompt": "Hi", "max_tokens": 2})
    assert (answer["model_type"], answer["adapter"]) == ("lora", None)
    assert "not an adapter; it is served as it is" in caplog.text


def test_adapter_names_that_cannot_be_used(model: Path, adapter: Path) -> None:
    for name in ("", "base"):
        with pytest.raises(ServiceError, match="cannot be called"):
            MLXModelRunner(model, adapters={name: adapter})
    with pytest.raises(ServiceError, match="two adapters are called"):
        LoRAModelRunner(adapter, adapters={"checkpoint_epoch_2": adapter}).load_model()


def test_models_by_tag_are_verified(
    bentoml_home: Path, tmp_path: Path, model: Path, adapter: Path
) -> None:
    from mlops.serving.bentoml.packager import package_model

    packaged = package_model(
        model_path=str(adapter), model_name="styled", model_version="1.0.0", build_bento=False
    )
    tag = packaged["model_tag"]
    runner = LoRAModelRunner(tag)
    answer = runner.predict({"prompt": "Hello", "max_tokens": 6})
    assert answer["adapter"] == "styled"
    assert runner.describe()["model_tag"] == tag
    expected = LoRAModelRunner(adapter).predict({"prompt": "Hello", "max_tokens": 6})
    assert answer["prediction"] == expected["prediction"]
    named = MLXModelRunner(model, adapters={"mine": tag})
    assert (
        named.predict({"prompt": "Hello", "max_tokens": 6, "adapter": "mine"})["prediction"]
        == (expected["prediction"])
    )
    with pytest.raises(IntegrityError):
        LoRAModelRunner(tag, digest="sha256:" + "0" * 64).load_model()

    assert runner.resolved is not None
    assert runner.resolved.base is not None
    weights = (runner.resolved.base.path / "model.safetensors").resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    for damaged in (LoRAModelRunner(tag), MLXModelRunner(str(runner.resolved.base.tag))):
        with pytest.raises(IntegrityError):
            damaged.load_model()
        assert not damaged.is_loaded


def test_an_adapter_is_verified_when_it_is_first_needed(
    bentoml_home: Path, tmp_path: Path, model: Path
) -> None:
    from mlops.serving.bentoml.packager import package_model

    tags = {}
    for seed, name in enumerate(("first", "second", "third"), start=1):
        folder = tiny_models.write_lora_adapter(tmp_path / name, model, seed=seed)
        packaged = package_model(str(folder), name, model_version="1.0.0", build_bento=False)
        tags[name] = packaged["model_tag"]
    runner = MLXModelRunner(
        model, adapters=tags, engine_config=engine.EngineConfig(max_resident_adapters=1)
    )
    runner.load_model()
    assert runner.statistics()["resident_adapters"]["loads"] == 1
    file = bentoml_home / "models" / "second" / "1.0.0" / "adapters.safetensors"
    content = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ask = {"prompt": "Hello", "max_tokens": 6}
    answers = runner.predict_batch([{**ask, "adapter": name} for name in (*tags, "base")])
    assert isinstance(answers[1], IntegrityError)
    texts = {one["prediction"] for one in answers if isinstance(one, dict)}
    assert len(texts) == 3
    file.write_bytes(content)
    texts.add(runner.predict({**ask, "adapter": "second"})["prediction"])
    assert len(texts) == 4


def test_what_cannot_be_loaded_is_a_bentoml_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    for path in (tmp_path / "missing", tmp_path / "empty", tmp_path / "model.onnx"):
        runner = MLXModelRunner(path)
        with pytest.raises(BentoMLError) as caught:
            runner.load_model()
        assert caught.value.operation
        assert not runner.is_loaded


class CustomModelRunner(MLXModelRunner):
    """As in the guide: any model, any output."""

    def _load_mlx_model(self) -> Any:
        import mlx.core as mx

        assert engine.in_owner()
        return mx.array(json.loads(Path(self.model_path).read_text(encoding="utf-8")))

    def _mlx_predict(self, input_data: Any) -> Any:
        assert engine.in_owner()
        if input_data == "fail":
            raise RuntimeError("my own failure")
        return {"product": self.model * input_data["factor"], "shape": np.array(self.model.shape)}


def test_a_custom_runner_serves_anything(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text("[1, 2, 3]", encoding="utf-8")
    runner = CustomModelRunner(path)
    assert runner.predict({"factor": 2}) == {
        "prediction": {"product": [2, 4, 6], "shape": [3]},
        "mlx_optimized": True,
        "model_type": "custom",
    }
    answers = runner.predict_batch([{"factor": 0}, "fail"])
    assert answers[0]["prediction"]["product"] == [0, 0, 0]  # type: ignore[index]
    assert isinstance(answers[1], RuntimeError)
    runner.unload_model()
    assert not runner.is_loaded


def test_a_custom_runner_that_cannot_load_says_so(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text("[1,", encoding="utf-8")
    with pytest.raises(ServiceError, match="cannot be loaded: JSONDecodeError") as caught:
        CustomModelRunner(path).load_model()
    assert caught.value.operation == "load_model"


def test_a_custom_runner_may_build_on_the_text_model(model: Path) -> None:
    class Shouting(MLXModelRunner):
        def _mlx_predict(self, input_data: Any) -> Any:
            return super()._mlx_predict(input_data)["prediction"].upper()

    ask = {"prompt": "Hello", "max_tokens": 6}
    expected = {
        "prediction": MLXModelRunner(model).predict(ask)["prediction"].upper(),
        "mlx_optimized": True,
        "model_type": "custom",
    }
    shouting = Shouting(model)
    assert not shouting.can_generate
    assert shouting.predict(ask) == expected
    answers = shouting.predict_batch([ask, {"prompt": ""}, ask])
    assert [answers[0], answers[2]] == [expected] * 2
    assert isinstance(answers[1], InvalidRequestError)


def test_half_a_custom_runner_is_told_what_is_missing(model: Path) -> None:
    class Half(MLXModelRunner):
        def _load_mlx_model(self) -> Any:
            return object()

    with pytest.raises(ServiceError, match="override both"):
        Half(model).predict("Hello")


def test_a_program_that_just_ends_leaves_no_trace(model: Path) -> None:
    program = f"""
from mlops.serving.bentoml.runner import MLXModelRunner
runner = MLXModelRunner({str(model)!r})
assert runner.get_memory_usage()["mlx_available"]
import sys
assert "mlx.core" not in sys.modules
print(runner.predict({{"prompt": "Hello", "max_tokens": 3}})["finish_reason"])
print(runner.predict_batch([{{"prompt": "Hello", "max_tokens": 3}}] * 2)[1]["finish_reason"])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "length\nlength\n")


def test_an_exit_in_a_hook_fails_one_request(tmp_path: Path) -> None:
    class Leaving(MLXModelRunner):
        def _load_mlx_model(self) -> Any:
            return 1

        def _mlx_predict(self, input_data: Any) -> Any:
            return sys.exit(3) if input_data == "leave" else input_data

    answers = Leaving(tmp_path).predict_batch(["a", "leave", "b"])
    assert isinstance(answers[1], EngineError)
    assert "SystemExit: 3" in str(answers[1])
    assert [answers[n]["prediction"] for n in (0, 2)] == ["a", "b"]  # type: ignore[index]


def test_an_exit_while_loading_is_a_failure(tmp_path: Path) -> None:
    class Leaving(CustomModelRunner):
        def _load_mlx_model(self) -> Any:
            sys.exit("no weights here")

    with pytest.raises(ServiceError, match="cannot be loaded: SystemExit: no weights here"):
        Leaving(tmp_path).load_model()


def test_a_custom_hook_finds_mlx_prepared(tmp_path: Path) -> None:
    program = f"""
from mlops.hardware import ensure_blas
from mlops.serving.runner import MLXModelRunner
class Custom(MLXModelRunner):
    def _load_mlx_model(self):
        import mlx.core as mx
        return str(mx.default_device())
    def _mlx_predict(self, input_data):
        return self.model
print(Custom({str(tmp_path)!r}, enable_mps=False).predict("x")["prediction"])
status = ensure_blas()
assert "imported before" not in (status.problem or ""), status
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu" in done.stdout


def test_the_memory_budget_reaches_the_weights(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path / "q4", hidden=64, quantize_bits=4)
    layouts = []
    for budget in (0, 2**30):
        runner = MLXModelRunner(folder, enable_mps=False, memory_budget_bytes=budget)
        runner.load_model()
        layouts.append(runner.describe()["layout"])
    assert layouts == ["4-bit (as stored)", "float32 (dequantized from 4-bit)"]


def test_overriding_one_hook_keeps_the_stored_model(
    bentoml_home: Path, model: Path, adapter: Path
) -> None:
    from mlops.serving.bentoml.packager import package_model

    packaged = package_model(
        model_path=str(adapter), model_name="styled", model_version="1.0.0", build_bento=False
    )
    tag, digest = packaged["model_tag"], packaged["model_digest"]

    class Answering(LoRAModelRunner):
        def _mlx_predict(self, input_data: Any) -> Any:
            return super()._mlx_predict(input_data)["prediction"].upper()

    class Loading(LoRAModelRunner):
        def _load_mlx_model(self) -> Any:
            return super()._load_mlx_model()

    ask = {"prompt": "Hello", "max_tokens": 6}
    expected = LoRAModelRunner(adapter).predict(ask)["prediction"]
    for made, answer in ((Answering, expected.upper()), (Loading, expected)):
        runner = made(tag, digest=digest)
        for _ in range(2):
            assert runner.predict(ask)["prediction"] == answer
            assert runner.describe()["model_tag"] == tag
            assert runner.describe()["default_adapter"] == "styled"
            runner.unload_model()
