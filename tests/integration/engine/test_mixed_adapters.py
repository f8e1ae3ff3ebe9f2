"""Adapters through the engine: rows of one batch, slots that change hands, files that are damaged.

Every answer is compared with what mlx-lm says with its own, unfused adapter.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_models
from engines import (
    TIMEOUT_S,
    ask_all,
    check_empty,
    mlx_lm_says,
    running,
    tokens_of,
    with_unfused_adapter,
)
from mlops import engine
from mlops.checkpoints import Checkpoint, recognise
from mlops.engine import Generation, GenerationRequest, GenerationResult, LoadedModel, Sampling
from mlops.errors import (
    AdapterNotFoundError,
    EngineError,
    IntegrityError,
    PackagingError,
)

PROMPT = tuple(b"Hello")
PROMPTS = [PROMPT, (97,), tuple(b"The quick brown fox jumps over"), tuple(b"1 2 3"), (50, 60)]
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
LONGEST = 24


def ask(adapter: str | None, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, adapter=adapter, **{"max_tokens": LONGEST, **fields})


def submit_together(one: engine.Engine, *requests: GenerationRequest) -> list[Generation]:
    """Submit requests between two steps, so that the same ones make the same batches."""
    return engine.run_in_owner(lambda: [one.submit(request) for request in requests])


def results_of(generations: list[Generation]) -> list[GenerationResult]:
    return [generation.result(TIMEOUT_S) for generation in generations]


def in_mlx_lms_form(peft: Path, base: Path, folder: Path) -> Path:
    """A PEFT adapter as mlx-lm's trainer writes them; the scale is in B."""

    def rewrite() -> None:
        import mlx.core as mx

        config = json.loads((peft / "adapter_config.json").read_text(encoding="utf-8"))
        weights = {}
        for key, array in mx.load(str(peft / "adapter_model.safetensors")).items():
            name, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
            module = name.rpartition(".")[2]
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
            missing = (0, config["r"] - rank)  # mlx-lm has one rank for all modules
            if kind == "A.weight":
                weights[f"{name}.lora_a"] = mx.pad(array.T, [(0, 0), missing])
            elif kind == "B.weight":
                weights[f"{name}.lora_b"] = mx.pad(scale * array.T, [missing, (0, 0)])
            else:
                weights[f"{name}.m"] = array
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
        keys = sorted({key.split(".", 3)[3].rpartition(".")[0] for key in weights})
        (folder / "adapter_config.json").write_text(
            json.dumps(
                {
                    "fine_tune_type": "dora" if config["use_dora"] else "lora",
                    "num_layers": -1,
                    "lora_parameters": {
                        "rank": config["r"],
                        "scale": 1.0,
                        "dropout": 0.0,
                        "keys": keys,
                    },
                    "model": str(base),
                }
            ),
            encoding="utf-8",
        )

    folder.mkdir()
    engine.run_in_owner(rewrite)
    return folder


MLX_LM_KINDS: dict[str, dict[str, Any]] = {
    "attention-2": {"rank": 2, "keys": ATTENTION},
    "all-8": {"rank": 8, "seed": 2},
    "last-layer-64": {"rank": 64, "seed": 3, "scale": 0.5, "num_layers": 1},
    "dora-8": {"rank": 8, "seed": 4, "dora": True},
}
PEFT_KINDS: dict[str, dict[str, Any]] = {
    "peft": {"target_modules": ["q_proj", "down_proj"]},
    "peft-rslora": {"use_rslora": True, "rank": 8},
    "peft-dora": {"dora": True, "target_modules": ["k_proj", "up_proj"]},
    "peft-patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1.0}},
}
EXPERT_KINDS: dict[str, dict[str, Any]] = {
    "all-4": {},
    "all-16": {"rank": 16, "seed": 2},
    "attention-2": MLX_LM_KINDS["attention-2"],
}
EMBEDDING_KINDS: dict[str, dict[str, Any]] = {
    "embeddings": {"keys": ["self_attn.q_proj", "model.embed_tokens"]},
    "embeddings-dora": {"keys": ["model.embed_tokens"], "dora": True, "seed": 2},
    "all-8": MLX_LM_KINDS["all-8"],
}


def write_adapters(
    folder: Path, base: Path, kinds: dict[str, dict[str, Any]]
) -> dict[str, tuple[Path, Path]]:
    """By name: the adapter, and the same one as mlx-lm reads it."""
    found = {}
    for name, arguments in kinds.items():
        if name.startswith("peft"):
            path = tiny_models.write_peft_adapter(folder / name, base, **arguments)
            found[name] = path, in_mlx_lms_form(path, base, folder / f"{name}-mlx")
        else:
            path = tiny_models.write_lora_adapter(folder / name, base, **arguments)
            found[name] = path, path
    return found


@pytest.mark.parametrize(
    ("architecture", "kinds", "quantize_bits", "memory_budget_bytes"),
    [
        ("llama", MLX_LM_KINDS | PEFT_KINDS, None, None),
        ("qwen3", MLX_LM_KINDS, None, None),
        ("mixtral", EXPERT_KINDS, None, None),
        ("qwen3_moe", EXPERT_KINDS, None, None),
        ("gemma3_text", EMBEDDING_KINDS, None, None),
        ("llama", MLX_LM_KINDS, 4, 0),
        ("llama", MLX_LM_KINDS, 8, None),
        ("mixtral", EXPERT_KINDS, 4, 0),
    ],
)
def test_rows_of_different_adapters_answer_as_mlx_lm_does(
    tmp_path: Path,
    architecture: str,
    kinds: dict[str, dict[str, Any]],
    quantize_bits: int | None,
    memory_budget_bytes: int | None,
) -> None:
    base = tiny_models.write_language_model(
        tmp_path / "base",
        architecture=architecture,
        quantize_bits=quantize_bits,
        tie_word_embeddings=architecture.startswith("gemma"),
    )
    adapters = write_adapters(tmp_path, base, kinds)
    loaded = engine.load_model(base, memory_budget_bytes=memory_budget_bytes)
    is_kept = memory_budget_bytes == 0
    assert loaded.layout.endswith("(as stored)") == (is_kept or quantize_bits is None)
    names = [None, *adapters, None, *reversed(adapters)]
    requests = [
        ask(name, PROMPTS[row % len(PROMPTS)], max_tokens=10 + row % 7)
        for row, name in enumerate(names)
    ]
    models = {name: with_unfused_adapter(base, theirs) for name, (_, theirs) in adapters.items()}
    expected = [
        mlx_lm_says(
            loaded.model if one.adapter is None else models[one.adapter], loaded.tokenizer, one
        )[1]
        for one in requests
    ]
    folders = {name: folder for name, (folder, _) in adapters.items()}
    with running(loaded, folders, prefix_memory_bytes=0) as one:
        one.preload()
        assert [r.tokens for r in results_of(submit_together(one, *requests))] == expected
        steps = one.statistics()["steps"]
        # All prompts in one pass, and all rows decode together from then on.
        assert steps["prefill"] <= 2
        assert steps["by_rows"].keys() >= {str(len(requests))}
        assert steps["by_adapters"].keys() >= {str(1 + len(adapters))}
        assert steps["mixed"] >= 9
        alone = [tokens_of(one, request)[0] for request in requests]
        assert alone == expected
    same_prompt = {request.adapter: request.prompt for request in requests}
    assert len({(same_prompt[r.adapter], e) for r, e in zip(requests, expected, strict=True)}) > 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    """Twelve adapters of one size that answer differently."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        tiny_models.write_lora_adapter(
            folder / str(seed), base, seed=seed, keys=ATTENTION, scale=4.0
        )
        for seed in range(13)
        if seed != 4  # its first answer is short
    ]


@pytest.fixture(scope="module")
def checkpoints(folders: list[Path]) -> list[Checkpoint]:
    return [recognise(folder) for folder in folders]


@pytest.fixture(scope="module")
def says(loaded: LoadedModel, base: Path, folders: list[Path]) -> list[tuple[int, ...]]:
    """What mlx-lm says with each of the adapters to `PROMPT`."""
    expected = [
        mlx_lm_says(with_unfused_adapter(base, folder), loaded.tokenizer, ask(None))[1]
        for folder in folders
    ]
    assert len({tokens[0] for tokens in expected}) == len(expected) == 12
    assert {len(tokens) for tokens in expected} == {LONGEST}
    return expected


@pytest.fixture(scope="module")
def base_says(loaded: LoadedModel) -> tuple[int, ...]:
    return mlx_lm_says(loaded.model, loaded.tokenizer, ask(None))[1]


def adapter_counts(one: engine.Engine) -> dict[str, int]:
    """Counts of the registry, after the steps that are due."""
    for _ in range(3):  # a step may still have to queue the next one
        engine.run_in_owner(int)
    counts: dict[str, int] = one.statistics()["resident_adapters"]
    assert counts["resident"] == counts["loads"] - counts["evictions"]
    return counts


def test_base_rows_are_bit_identical_beside_adapters(
    tmp_path: Path, base: Path, loaded: LoadedModel
) -> None:
    names = [None, "all-8", None, "dora-8", "last-layer-64", None]
    adapters = {
        name: tiny_models.write_lora_adapter(tmp_path / name, base, **MLX_LM_KINDS[name])
        for name in names
        if name is not None
    }
    fields: dict[str, Any] = {"ignore_eos": True, "logprobs": 3}
    sampled = Sampling(temperature=0.9, top_p=0.9, seed=5)

    def answers(of: LoadedModel, adapters: dict[str, Path], names: list[str | None]) -> list[Any]:
        with running(of, adapters) as one:
            one.preload()
            requests = [
                ask(name, prompt, sampling=sampling, **fields)
                for name, prompt in zip(names, PROMPTS + PROMPTS[:1], strict=True)
                for sampling in (Sampling(), sampled)
            ]
            found = results_of(submit_together(one, *requests))
        return [(result.tokens, result.logprobs) for result in found]

    mixed = answers(loaded, adapters, names)
    alone = answers(engine.load_model(base), {}, [None] * len(names))
    for row, name in enumerate(name for name in names for _ in range(2)):
        (tokens, logprobs), (others, others_logprobs) = mixed[row], alone[row]
        assert (tokens == others) is (name is None)
        if name is None:  # to the bit on most processors; some BLAS kernels differ in the last ones
            values = [one.logprob for one in logprobs]
            assert values == pytest.approx([one.logprob for one in others_logprobs], abs=1e-4)


def test_an_adapter_that_joins_leaves_the_rows_of_others_alone(
    loaded: LoadedModel,
    folders: list[Path],
    says: list[tuple[int, ...]],
    base_says: tuple[int, ...],
) -> None:
    adapters = {str(number): folder for number, folder in enumerate(folders)}
    with running(loaded, adapters) as one:
        first = one.submit(ask(None))
        others = []
        for number in range(len(folders)):  # each is loaded while those before it decode
            others.append(one.submit(ask(str(number))))
            while one.statistics()["resident_adapters"]["resident"] <= number:
                engine.run_in_owner(int)
        assert first.result(TIMEOUT_S).tokens == base_says
        assert [result.tokens for result in results_of(others)] == says


def test_300_adapters_in_8_slots(
    loaded: LoadedModel, checkpoints: list[Checkpoint], says: list[tuple[int, ...]]
) -> None:
    source = random.Random(3)  # noqa: S311
    with running(loaded, max_resident_adapters=8, prefix_memory_bytes=2**22) as one:
        for number in range(300):
            one.add_adapter(f"a{number}", checkpoints[number % 12])
        numbers = [source.randrange(300) for _ in range(150)]
        lengths = [source.randint(1, LONGEST) for _ in numbers]
        generations = []
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            generations.append(one.submit(ask(f"a{number}", max_tokens=length)))
            if row % 20 == 19:
                generations[row - 10].result(TIMEOUT_S)
                one.adapters.check()
        found = [result.tokens for result in results_of(generations)]
        counts = adapter_counts(one)
        mixed = one.statistics()["steps"]["by_adapters"]
    assert found == [
        says[number % 12][:length] for number, length in zip(numbers, lengths, strict=True)
    ]
    assert (counts["registered"], counts["resident"]) == (300, 8)
    assert len(set(numbers)) <= counts["loads"] <= len(numbers)
    assert "8" in mixed
    assert max(map(int, mixed)) == 8


def test_the_least_recently_used_adapter_leaves(
    loaded: LoadedModel, folders: list[Path], says: list[tuple[int, ...]]
) -> None:
    adapters = dict(zip("abc", folders, strict=False))
    loads = []
    with running(loaded, adapters, max_resident_adapters=2) as one:
        for name in "abacab":
            assert tokens_of(one, ask(name)) == [says["abc".index(name)]]
            loads.append(adapter_counts(one)["loads"])
    assert loads == [1, 2, 2, 3, 3, 4]


def test_a_pinned_adapter_stays(
    loaded: LoadedModel,
    folders: list[Path],
    checkpoints: list[Checkpoint],
    says: list[tuple[int, ...]],
) -> None:
    with running(loaded, dict(zip("abc", folders, strict=False)), max_resident_adapters=2) as one:
        one.add_adapter("pinned", checkpoints[3], is_pinned=True)
        one.pin_adapter("a")
        for name in ("pinned", "a"):
            tokens_of(one, ask(name))
        with pytest.raises(EngineError, match=r"2 slots for adapters, of which 2 pinned ones hold"):
            tokens_of(one, ask("b"))
        assert tokens_of(one, ask("pinned"), ask("a")) == [says[3], says[0]]
        assert adapter_counts(one)["loads"] == 2
        one.pin_adapter("a", False)
        assert tokens_of(one, ask("b"), ask("c")) == [says[1], says[2]]
        assert tokens_of(one, ask("pinned")) == [says[3]]
        counts = adapter_counts(one)
        assert (counts["loads"], counts["evictions"], counts["pinned"]) == (4, 2, 1)


@pytest.mark.parametrize("max_resident", [1, 2])
def test_requests_of_a_replaced_adapter_finish_with_it(
    loaded: LoadedModel,
    checkpoints: list[Checkpoint],
    says: list[tuple[int, ...]],
    max_resident: int,
) -> None:
    with running(loaded, max_resident_adapters=max_resident, max_rows=3) as one:
        one.add_adapter("style", checkpoints[0])
        one.preload()
        generations = submit_together(one, *[ask("style")] * 5)  # two of them have no row yet
        one.add_adapter("style", checkpoints[1])
        generations += submit_together(one, ask("style"), ask("style"))
        one.add_adapter("style", checkpoints[2])
        generations.append(one.submit(ask("style")))
        found = [result.tokens for result in results_of(generations)]
        assert found == [says[0]] * 5 + [says[1]] * 2 + [says[2]]
        counts = adapter_counts(one)
        assert (counts["registered"], counts["resident"]) == (1, 1)


def test_requests_of_a_removed_adapter_finish(
    loaded: LoadedModel, checkpoints: list[Checkpoint], says: list[tuple[int, ...]]
) -> None:
    with running(loaded, max_rows=2) as one:
        one.add_adapter("style", checkpoints[0])
        generations = submit_together(one, *[ask("style")] * 3)
        one.remove_adapter("style")
        with pytest.raises(AdapterNotFoundError, match="this model has none"):
            one.submit(ask("style"))
        with pytest.raises(AdapterNotFoundError):
            one.remove_adapter("style")
        assert [result.tokens for result in results_of(generations)] == [says[0]] * 3
        counts = adapter_counts(one)
        assert (counts["registered"], counts["resident"], counts["evictions"]) == (0, 0, 1)


def test_unknown_names_and_names_that_cannot_be_used(
    loaded: LoadedModel, folders: list[Path], checkpoints: list[Checkpoint], base: Path
) -> None:
    with running(loaded, {"style": folders[0]}) as one:
        with pytest.raises(AdapterNotFoundError, match="this model has 'style', and \"base\""):
            one.submit(ask("nope"))
        with pytest.raises(AdapterNotFoundError):
            one.pin_adapter("nope")
        for name in ("", "base", "x" * 300, "a\n"):
            with pytest.raises(EngineError, match="cannot be called"):
                one.add_adapter(name, checkpoints[0])
        with pytest.raises(PackagingError, match="not an adapter"):
            one.add_adapter("model", recognise(base))
        assert one.adapters.names == ("style",)
        assert one.statistics()["requests"]["submitted"] == 0


@pytest.mark.parametrize("arguments", [{"hidden": 64}, {"layers": 3}])
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, loaded: LoadedModel, arguments: dict[str, int]
) -> None:
    other = tiny_models.write_language_model(tmp_path / "other", **arguments)
    adapter = recognise(tiny_models.write_lora_adapter(tmp_path / "adapter", other))
    with running(loaded) as one:
        with pytest.raises(PackagingError):
            one.add_adapter("style", adapter)
        assert one.adapters.names == ()


def test_a_damaged_file_fails_its_own_requests_until_it_is_repaired(
    tmp_path: Path,
    loaded: LoadedModel,
    folders: list[Path],
    says: list[tuple[int, ...]],
    base_says: tuple[int, ...],
) -> None:
    damaged = shutil.copytree(folders[0], tmp_path / "damaged")
    with running(loaded, {"damaged": damaged, "good": folders[1]}) as one:
        file = damaged / "adapters.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-100])
        generations = submit_together(one, ask("damaged"), ask("good"), ask(None), ask("damaged"))
        for failed in (generations[0], generations[3]):
            with pytest.raises(PackagingError, match="cannot be read"):
                failed.result(TIMEOUT_S)
        assert [one.tokens for one in results_of(generations[1:3])] == [says[1], base_says]
        assert adapter_counts(one)["failed"] == 1
        file.write_bytes(content)
        assert tokens_of(one, ask("damaged"), ask("good")) == [says[0], says[1]]
        assert adapter_counts(one)["failed"] == 0


def test_files_are_verified_before_each_load(
    loaded: LoadedModel, checkpoints: list[Checkpoint], says: list[tuple[int, ...]]
) -> None:
    problems: list[BaseException | None] = [
        IntegrityError("a file was changed"),
        None,
        SystemExit(),
    ]
    threads = []

    def verify() -> None:
        threads.append(threading.current_thread())
        assert not engine.in_owner()
        if problem := problems.pop(0):
            raise problem

    with running(loaded, max_resident_adapters=1) as one:
        one.add_adapter("checked", checkpoints[0], verify=verify)
        one.add_adapter("other", checkpoints[1])
        bad, good = submit_together(one, ask("checked"), ask("other"))
        with pytest.raises(IntegrityError, match="a file was changed"):
            bad.result(TIMEOUT_S)
        assert good.result(TIMEOUT_S).tokens == says[1]
        assert tokens_of(one, ask("checked")) == [says[0]]
        assert tokens_of(one, ask("checked"), ask("other")) == [says[0], says[1]]
        with pytest.raises(EngineError, match="SystemExit"):
            tokens_of(one, ask("checked"))
    assert len(threads) == 3
    assert threading.main_thread() not in threads


def test_others_decode_while_files_are_verified(
    loaded: LoadedModel,
    checkpoints: list[Checkpoint],
    says: list[tuple[int, ...]],
    base_says: tuple[int, ...],
) -> None:
    is_begun, may_end = threading.Event(), threading.Event()

    def verify() -> None:
        is_begun.set()
        assert may_end.wait(TIMEOUT_S)

    with running(loaded, max_resident_adapters=2) as one:
        one.add_adapter("slow", checkpoints[0], verify=verify)
        one.add_adapter("other", checkpoints[1])
        one.add_adapter("third", checkpoints[2])
        slow, given_up = submit_together(one, ask("slow"), ask("slow"))
        try:
            assert is_begun.wait(TIMEOUT_S)
            assert tokens_of(one, ask("other"), ask(None)) == [says[1], base_says]
            assert tokens_of(one, ask("third"), ask(None)) == [says[2], base_says]
            given_up.cancel()
            assert given_up.result(TIMEOUT_S).finish_reason == "cancelled"
            assert not slow.future.done()
            one.add_adapter("slow", checkpoints[3])  # another one of this name
            replacing = one.submit(ask("slow"))
        finally:
            may_end.set()
        assert [result.tokens for result in results_of([slow, replacing])] == [says[0], says[3]]


def test_nobody_waits_for_a_verification_when_the_engine_is_closed(
    loaded: LoadedModel, checkpoints: list[Checkpoint]
) -> None:
    may_end, has_ended = threading.Event(), threading.Event()

    def verify() -> None:
        assert may_end.wait(TIMEOUT_S)
        has_ended.set()

    one = engine.Engine(loaded)
    one.add_adapter("slow", checkpoints[0], verify=verify)
    generation = one.submit(ask("slow"))
    one.close()
    with pytest.raises(EngineError, match="closed"):
        generation.result(TIMEOUT_S)
    may_end.set()
    assert has_ended.wait(TIMEOUT_S)
    engine.run_in_owner(int)
    check_empty(one)


def test_an_adapter_larger_than_its_budget_is_refused_with_numbers(
    *,
    tmp_path: Path,
    base: Path,
    loaded: LoadedModel,
    folders: list[Path],
    checkpoints: list[Checkpoint],
    says: list[tuple[int, ...]],
) -> None:
    large = recognise(tiny_models.write_lora_adapter(tmp_path / "large", base, rank=64))
    num_bytes = loaded.banks.num_bytes(checkpoints[0])
    with running(
        loaded, dict(zip("abc", folders, strict=False)), adapter_memory_bytes=2 * num_bytes
    ) as one:
        one.add_adapter("large", large)
        generations = submit_together(one, ask("a"), ask("large"), ask("b"), ask("c"))
        with pytest.raises(EngineError, match=r"'large' takes 0\.\d MiB; there are 0\.\d MiB"):
            generations.pop(1).result(TIMEOUT_S)
        assert [result.tokens for result in results_of(generations)] == says[:3]
        assert adapter_counts(one)["bytes"] == 2 * num_bytes


@pytest.mark.parametrize("has_verify", [False, True])
@pytest.mark.parametrize(("max_resident", "max_rows"), [(1, 4), (2, 4), (2, 8), (3, 2)])
def test_more_busy_adapters_than_slots(
    *,
    loaded: LoadedModel,
    checkpoints: list[Checkpoint],
    says: list[tuple[int, ...]],
    has_verify: bool,
    max_resident: int,
    max_rows: int,
) -> None:
    """Two adapters always have requests; those of others get their turns all the same."""
    source = random.Random(4)  # noqa: S311
    busy, patient = ["a0", "a1"], ["a2", "a3", "a4"]
    ended: list[str] = []
    verify: Callable[[], None] | None = (lambda: None) if has_verify else None
    with running(
        loaded, max_resident_adapters=max_resident, max_rows=max_rows, prefix_memory_bytes=0
    ) as one:
        for name, checkpoint in zip(busy + patient, checkpoints, strict=False):
            one.add_adapter(name, checkpoint, verify=verify)
        names = busy * 30
        requests = [ask(name, max_tokens=source.randint(2, 9)) for name in names]
        requests += [ask(name, max_tokens=4) for name in patient]
        generations = submit_together(one, *requests)
        for request, generation in zip(requests, generations, strict=True):
            name = str(request.adapter)
            generation.future.add_done_callback(lambda _, name=name: ended.append(name))
        found = [result.tokens for result in results_of(generations)]
    assert found == [says[int(one.adapter[1])][: one.max_tokens] for one in requests if one.adapter]
    # Each of the three may wait until what has rows has ended, twice.
    last = max(ended.index(name) for name in patient)
    assert last <= len(patient) * 2 * max_rows + len(patient)


def test_adapters_that_wait_for_each_others_slot_are_both_served(
    loaded: LoadedModel, checkpoints: list[Checkpoint], says: list[tuple[int, ...]]
) -> None:
    """An adapter that was just loaded is not evicted for the next one before it has a row."""
    with running(loaded, max_resident_adapters=1) as one:
        for number in range(4):
            one.add_adapter(str(number), checkpoints[number], verify=lambda: None)
        requests = [ask(str(number), max_tokens=5) for number in range(4)]
        found = results_of(submit_together(one, *requests * 2))
        assert [result.tokens for result in found] == [tokens[:5] for tokens in says[:4]] * 2
        assert adapter_counts(one)["loads"] <= 8


def test_a_slot_is_not_taken_from_a_request_that_memory_makes_wait(
    loaded: LoadedModel, checkpoints: list[Checkpoint], says: list[tuple[int, ...]]
) -> None:
    enough_for_one = loaded.trial.cache_cost.num_bytes(len(PROMPT) + LONGEST)
    with running(
        loaded, max_resident_adapters=1, cache_memory_bytes=enough_for_one, prefix_memory_bytes=0
    ) as one:
        for number in range(3):
            one.add_adapter(str(number), checkpoints[number])
        found = results_of(submit_together(one, *[ask(str(number)) for number in (0, 1, 2, 0, 1)]))
        assert [result.tokens for result in found] == [says[number] for number in (0, 1, 2, 0, 1)]


def test_preloading_fills_the_slots_and_evicts_nobody(
    loaded: LoadedModel, checkpoints: list[Checkpoint], says: list[tuple[int, ...]]
) -> None:
    with running(loaded, max_resident_adapters=2) as one:
        for number in range(4):
            one.add_adapter(str(number), checkpoints[number])
        one.preload()
        one.preload()
        counts = adapter_counts(one)
        assert (counts["resident"], counts["loads"], counts["in_use"]) == (2, 2, 0)
        assert tokens_of(one, ask("0"), ask("1")) == says[:2]
        assert adapter_counts(one)["loads"] == 2


def test_preloading_a_damaged_adapter_says_so(
    tmp_path: Path, loaded: LoadedModel, folders: list[Path], checkpoints: list[Checkpoint]
) -> None:
    damaged = shutil.copytree(folders[0], tmp_path / "damaged")
    with running(loaded, {"damaged": damaged}) as one:
        (damaged / "adapters.safetensors").write_bytes(b"")
        with pytest.raises(PackagingError, match="cannot be read"):
            one.preload()

        def verify() -> None:
            raise IntegrityError("a file was changed")

        one.add_adapter("damaged", checkpoints[0], verify=verify)
        with pytest.raises(IntegrityError):
            one.preload()
        assert adapter_counts(one)["in_use"] == 0


def test_cached_prefixes_belong_to_one_generation_of_one_adapter(
    loaded: LoadedModel, base: Path, folders: list[Path], checkpoints: list[Checkpoint]
) -> None:
    long = ask(None, tuple(b"a beginning that many prompts have in common " * 2), max_tokens=6)
    expected = [
        mlx_lm_says(with_unfused_adapter(base, folder), loaded.tokenizer, long)[1]
        for folder in folders[:2]
    ]
    styled = ask("style", long.prompt, max_tokens=6)
    with running(loaded, {"style": folders[0]}) as one:
        for number in range(2):
            one.add_adapter("style", checkpoints[number])
            first, again = (ask_all(one, styled)[0] for _ in range(2))
            assert first.cached_tokens == 0
            assert again.cached_tokens >= len(long.prompt) - 2
            assert [first.tokens, again.tokens] == [expected[number]] * 2
        assert ask_all(one, long)[0].cached_tokens == 0
        assert one.statistics()["prefix_cache"]["entries"] >= 1


Action = tuple[str, int, int]
ACTIONS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 4), st.integers(1, LONGEST)),
    st.tuples(st.just("ask"), st.integers(0, 4), st.integers(1, LONGEST)),
    st.tuples(st.just("replace"), st.integers(0, 4), st.integers(0, 11)),
    st.tuples(st.just("remove"), st.integers(0, 4), st.just(0)),
    st.tuples(st.just("pin"), st.integers(0, 4), st.integers(0, 1)),
    st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 40), st.just(0)),
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    actions=st.lists(ACTIONS, min_size=10, max_size=50),
    max_resident=st.integers(1, 3),
    max_rows=st.integers(1, 5),
    has_verify=st.booleans(),
)
def test_whatever_happens_nobody_gets_anothers_tokens(
    *,
    loaded: LoadedModel,
    checkpoints: list[Checkpoint],
    says: list[tuple[int, ...]],
    actions: list[Action],
    max_resident: int,
    max_rows: int,
    has_verify: bool,
) -> None:
    verify: Callable[[], None] | None = (lambda: None) if has_verify else None
    current: dict[str, int] = {}
    asked: list[tuple[Generation, tuple[int, ...]]] = []
    with running(loaded, max_resident_adapters=max_resident, max_rows=max_rows) as one:
        for action, number, value in actions:
            name = f"a{number}"
            if action == "replace" or (action == "ask" and name not in current):
                current[name] = value % 12
                one.add_adapter(name, checkpoints[current[name]], verify=verify)
            if action == "ask":
                expected = says[current[name]][:value]
                asked.append((one.submit(ask(name, max_tokens=value)), expected))
            elif action == "remove" and name in current:
                one.remove_adapter(name)
                del current[name]
            elif action == "pin" and name in current:
                one.pin_adapter(name, bool(value))
            elif action == "cancel" and asked:
                asked[number % len(asked)][0].cancel()
            elif action == "wait" and asked:
                wait([asked[number % len(asked)][0].future], TIMEOUT_S)
                one.adapters.check()
        for generation, expected in asked:
            try:
                result = generation.result(TIMEOUT_S)
            except EngineError as exc:
                assert "unpin one" in str(exc)
                continue
            if result.finish_reason == "cancelled":
                assert result.tokens == expected[: len(result.tokens)]
            else:
                assert result.tokens == expected
        counts = adapter_counts(one)
        assert counts["registered"] == len(current)
        assert counts["resident"] <= max_resident
