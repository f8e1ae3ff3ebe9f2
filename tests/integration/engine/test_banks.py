"""Adapters by row: a row of a mixed batch equals mlx-lm's own adapter; base rows are the base's.

References are mlx-lm's unfused adapters, in float32, over the same batch.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from mlops.checkpoints import Checkpoint, recognise
from mlops.engine.banks import AdapterBanks, padded_rank
from mlops.engine.owner import run_in_owner
from mlops.errors import PackagingError

CLOSE = {"atol": 3e-5, "rtol": 3e-4}
PROMPTS = np.array([[72, 101, 108, 108], [111, 32, 119, 111], [114, 108, 100, 33]])


def in_owner(test: Callable[..., None]) -> Callable[..., None]:
    """Run a whole test in the thread that MLX belongs to."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        run_in_owner(functools.partial(test, **arguments))

    return run


class Served:
    """A model with banks, and mlx-lm's own model of each adapter for comparison."""

    def __init__(self, base: Path, device: str = "cpu") -> None:
        from mlx_lm.utils import load_model

        self.base = base
        self.model = load_model(base)[0]
        self.banks = AdapterBanks(self.model, recognise(base), device)
        self.paths: dict[int, Path] = {}

    def load(self, path: Path) -> int:
        slot = self.banks.load(path.name, recognise(path))
        self.paths[slot] = path
        return slot

    def logits(self, slots: Sequence[int], ids: np.ndarray | None = None) -> np.ndarray:
        import mlx.core as mx

        ids = np.resize(PROMPTS, (len(slots), 4)) if ids is None else ids
        self.banks.use(self.banks.select(slots))
        try:
            return np.array(self.model(mx.array(ids)).astype(mx.float32))
        finally:
            self.banks.use(None)

    def theirs(self, slot: int, ids: np.ndarray) -> np.ndarray:
        import mlx.core as mx
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        model = load_model(self.base)[0]
        if slot:
            model = load_adapters(model, str(self.paths[slot]))
        return np.array(model(mx.array(ids)).astype(mx.float32))

    def check_rows(self, slots: Sequence[int], ids: np.ndarray | None = None) -> None:
        """Each row is what mlx-lm computes for the batch with that row's adapter alone."""
        ids = np.resize(PROMPTS, (len(slots), 4)) if ids is None else ids
        ours, base = self.logits(slots, ids), self.logits([0] * len(slots), ids)
        for slot in set(slots):
            rows = [row for row, other in enumerate(slots) if other == slot]
            if slot == 0:
                np.testing.assert_array_equal(ours[rows], base[rows])
            else:
                np.testing.assert_allclose(ours[rows], self.theirs(slot, ids)[rows], **CLOSE)
                assert np.abs(ours[rows] - base[rows]).max() > 1e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of different ranks, kinds and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    write = functools.partial(run_in_owner, tiny_models.write_lora_adapter)
    return [
        write(folder / "three", base, rank=3, keys=["self_attn.q_proj", "self_attn.v_proj"]),
        write(folder / "eight", base, rank=8, seed=2),
        write(folder / "dora", base, rank=8, dora=True, seed=3),
        write(folder / "large", base, rank=64, scale=0.5, seed=4, num_layers=1),
        write(folder / "ends", base, rank=3, seed=5, keys=["lm_head", "model.embed_tokens"]),
        write(folder / "mlp", base, rank=2, seed=6, keys=["mlp.up_proj", "mlp.down_proj"]),
    ]


@in_owner
def test_rows_of_different_adapters_share_a_forward_pass(base: Path, adapters: list[Path]) -> None:
    served = Served(base)
    slots = [served.load(path) for path in adapters]
    assert len(set(slots)) == len(slots)
    assert min(slots) >= 1
    served.check_rows([0, *slots, 0, *reversed(slots)])
    served.check_rows([slots[2]])
    served.check_rows([slots[0], 0])
    one_token = np.resize(PROMPTS, (len(slots), 1))
    served.check_rows(slots, one_token)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("qwen2", None),  # q, k and v with a bias
        ("qwen3", None),
        ("phi3", None),
        ("gemma3_text", ["self_attn.q_proj", "mlp.up_proj", "model.embed_tokens"]),
        ("gemma2", ["self_attn.k_proj", "model.embed_tokens"]),
    ],
)
@in_owner
def test_other_architectures(tmp_path: Path, architecture: str, keys: list[str] | None) -> None:
    base = tiny_models.write_language_model(
        tmp_path / "base",
        architecture=architecture,
        tie_word_embeddings=architecture.startswith("gemma"),
    )
    give_biases(base)
    served = Served(base)
    slots = [
        served.load(
            tiny_models.write_lora_adapter(
                tmp_path / str(seed), base, seed=seed, dora=seed == 2, rank=2 * seed, keys=keys
            )
        )
        for seed in (1, 2, 3)
    ]
    served.check_rows([slots[2], 0, slots[1], slots[0], slots[1], 0])


def give_biases(base: Path) -> None:
    """Fill biases, which are zero in a new model."""
    import mlx.core as mx

    path = base / "model.safetensors"
    weights = {
        name: mx.random.normal(array.shape) if name.endswith(".bias") else array + 0
        for name, array in mx.load(str(path)).items()
    }
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})


@pytest.mark.parametrize(
    ("architecture", "block"),
    [("mixtral", "block_sparse_moe.switch_mlp"), ("olmoe", "mlp.switch_mlp")],
)
@pytest.mark.parametrize("num_tokens", [1, 4, 20])  # 12, 48 and 240 indices: from 64 on sorted
@in_owner
def test_experts(tmp_path: Path, architecture: str, block: str, num_tokens: int) -> None:
    """mixtral keeps the rows apart, olmoe flattens them before its experts."""
    base = tiny_models.write_language_model(tmp_path / "base", architecture=architecture)
    served = Served(base)
    keys = [f"{block}.up_proj", f"{block}.down_proj"]
    slots = [
        served.load(tiny_models.write_lora_adapter(tmp_path / name, base, **arguments))
        for name, arguments in {
            "all": {},
            "large": {"rank": 16, "seed": 2},
            "some": {"rank": 3, "seed": 3, "keys": keys},
            "attention": {"seed": 4, "keys": ["self_attn.v_proj"]},
        }.items()
    ]
    ids = np.random.default_rng(0).integers(0, 250, (6, num_tokens))
    served.check_rows([slots[1], 0, slots[0], slots[2], slots[3], slots[0]], ids)
    served.check_rows([slots[3], 0, 0, 0, 0, slots[3]], ids)
    served.check_rows([slots[2]] * 6, ids)


@in_owner
def test_experts_kept_quantized(tmp_path: Path) -> None:
    base = tiny_models.write_language_model(
        tmp_path / "base", architecture="mixtral", quantize_bits=4
    )
    served = Served(base)
    slot = served.load(tiny_models.write_lora_adapter(tmp_path / "adapter", base))
    ids = np.random.default_rng(0).integers(0, 250, (2, 40))
    served.check_rows([slot, 0], ids)


@in_owner
def test_a_base_that_stays_quantized(tmp_path: Path) -> None:
    base = tiny_models.write_language_model(tmp_path / "base", quantize_bits=4)
    served = Served(base)
    slots = [
        served.load(
            tiny_models.write_lora_adapter(tmp_path / str(rank), base, rank=rank, dora=rank == 8)
        )
        for rank in (3, 8, 64)
    ]
    served.check_rows([slots[0], 0, slots[1], slots[2]])


@in_owner
def test_a_bfloat16_model_keeps_its_type(tmp_path: Path) -> None:
    import mlx.core as mx

    base = tiny_models.write_language_model(tmp_path / "base", dtype="bfloat16")
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base, dora=True)
    served = Served(base)
    slot = served.load(adapter)
    served.banks.use(served.banks.select([slot]))
    assert served.model(mx.array(PROMPTS[:1])).dtype == mx.bfloat16
    on_gpu = Served(base, "gpu")
    factors_on_gpu = on_gpu.banks.num_bytes(recognise(adapter))
    assert factors_on_gpu < served.banks.num_bytes(recognise(adapter))
    assert on_gpu.load(adapter) == 1
    assert on_gpu.banks.num_resident_bytes < served.banks.num_resident_bytes


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@in_owner
def test_peft_adapters(tmp_path: Path, base: Path, dora: bool, use_rslora: bool) -> None:
    """The formula itself, on dense weights: PEFT's own code is not at hand."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    rank, alpha = 4, 8.0
    path = tiny_models.write_peft_adapter(
        tmp_path / "peft",
        base,
        rank=rank,
        alpha=alpha,
        dora=dora,
        use_rslora=use_rslora,
        target_modules=["q_proj", "gate_proj", "down_proj"],
    )
    model, tensors = load_model(base)[0], mx.load(str(path / "adapter_model.safetensors"))
    scale = alpha / rank**0.5 if use_rslora else alpha / rank
    for name, layer in model.named_modules():
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" not in tensors:
            continue
        layer.weight = layer.weight + scale * (
            tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        )
        if dora:
            norm = mx.linalg.norm(layer.weight, axis=1)
            layer.weight *= (tensors[f"{key}.lora_magnitude_vector"] / norm)[:, None]
    expected = np.array(model(mx.array(PROMPTS)))
    served = Served(base)
    slot = served.load(path)
    ours = served.logits([slot, 0, slot])
    np.testing.assert_allclose(ours[[0, 2]], expected[[0, 2]], **CLOSE)
    np.testing.assert_array_equal(ours[1], served.logits([0, 0, 0])[1])


@in_owner
def test_embeddings_in_pefts_form(tmp_path: Path, base: Path) -> None:
    import json

    import mlx.core as mx

    peft = tiny_models.write_peft_adapter(tmp_path / "peft", base)
    a, b = mx.random.normal((4, tiny_models.vocabulary_size())), mx.random.normal((32, 4)) * 0.2
    name = "model.embed_tokens"
    mx.save_safetensors(
        str(peft / "adapter_model.safetensors"),
        {
            f"base_model.model.{name}.lora_embedding_A": a,
            f"base_model.model.{name}.lora_embedding_B": b,
        },
    )
    mlx = tiny_models.write_lora_adapter(tmp_path / "mlx", base, keys=[name])
    mx.save_safetensors(
        str(mlx / "adapters.safetensors"), {f"{name}.lora_a": a.T, f"{name}.lora_b": b.T}
    )
    assert json.loads((mlx / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 2
    served = Served(base)
    slots = [served.load(peft), served.load(mlx)]
    ids = np.resize(PROMPTS[0], (2, 4))
    ours = served.logits(slots, ids)
    np.testing.assert_array_equal(ours[0], ours[1])
    np.testing.assert_allclose(ours, served.theirs(slots[1], ids), **CLOSE)


@in_owner
def test_other_rows_are_untouched_by_dora_rows(tmp_path: Path) -> None:
    """Bit for bit, biases too: only what the row itself has decides."""
    base = tiny_models.write_language_model(tmp_path / "base", architecture="qwen2")
    give_biases(base)
    served = Served(base)
    plain, dora = (
        served.load(tiny_models.write_lora_adapter(tmp_path / str(n), base, seed=n, dora=n == 1))
        for n in range(2)
    )
    ids = np.resize(PROMPTS, (4, 4))
    mixed = served.logits([plain, dora, 0, dora], ids)
    np.testing.assert_array_equal(mixed[0], served.logits([plain, plain, 0, 0], ids)[0])
    np.testing.assert_array_equal(mixed[2], served.logits([0] * 4, ids)[2])


@in_owner
def test_padding_does_not_matter(base: Path, adapters: list[Path]) -> None:
    """Prompts of different lengths, padded on the left with a cache, as a batch is prefilled."""
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache

    served = Served(base)
    slots = [served.load(path) for path in adapters[:3]]
    ids, padding = PROMPTS.copy(), [2, 0, 1]
    for row, width in enumerate(padding):
        ids[row, :width] = 0
    cache = [BatchKVCache(padding) for _ in served.model.layers]
    served.banks.use(served.banks.select(slots))
    together = np.array(served.model(mx.array(ids), cache=cache))
    served.banks.use(None)
    for row, (slot, width) in enumerate(zip(slots, padding, strict=True)):
        alone = served.logits([slot], ids[row : row + 1, width:])
        np.testing.assert_allclose(together[row, width:], alone[0], **CLOSE)
        behind = np.concatenate([ids[row : row + 1, width:], np.zeros((1, width), int)], axis=1)
        to_the_right = served.logits([slot], behind)[0, : 4 - width]
        np.testing.assert_allclose(to_the_right, alone[0], **CLOSE)


@settings(max_examples=20, deadline=None)
@given(order=st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_rows_may_stand_in_any_order(served_all: Served, order: list[int]) -> None:
    def run() -> None:
        ids = np.resize(PROMPTS[0], (len(order), 4))
        rows = served_all.logits(order, ids)
        reverse = served_all.logits(order[::-1], ids)[::-1]
        np.testing.assert_allclose(rows, reverse, **CLOSE)
        for slot, row in zip(order, rows, strict=True):
            np.testing.assert_allclose(row, served_all.logits([slot], ids[:1])[0], **CLOSE)

    run_in_owner(run)


@pytest.fixture(scope="module")
def served_all(base: Path, adapters: list[Path]) -> Served:
    def load() -> Served:
        served = Served(base)
        assert [served.load(path) for path in adapters] == [1, 2, 3, 4, 5, 6]
        return served

    return run_in_owner(load)


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapter_model.safetensors"])
@in_owner
def test_an_adapter_in_the_hubs_cache(tmp_path: Path, base: Path, file: str) -> None:
    write = (
        tiny_models.write_lora_adapter
        if file == "adapters.safetensors"
        else tiny_models.write_peft_adapter
    )
    cache = tmp_path / "models--org--adapter"
    adapter = write(cache / "snapshots" / "0f1e", base)
    plain = shutil.copytree(adapter, tmp_path / "plain")
    for at in (adapter / file, adapter / "adapter_config.json"):
        blob = cache / "blobs" / f"ab{len(at.name)}"  # called by a digest
        blob.parent.mkdir(exist_ok=True)
        at.rename(blob)
        at.symlink_to(Path("..", "..", "blobs", blob.name))
    served = Served(base)
    in_cache, in_folder = served.load(adapter), served.load(plain)
    logits = served.logits([in_cache, in_folder, 0], np.resize(PROMPTS[0], (3, 4)))
    np.testing.assert_allclose(logits[0], logits[1], **CLOSE)
    assert not np.allclose(logits[0], logits[2], **CLOSE)


@in_owner
def test_a_freed_slot_keeps_no_trace(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    served = Served(base)
    kept = served.load(adapters[1])
    for before in (adapters[1], adapters[2]):  # LoRA in every module, then DoRA
        slot = served.load(before)
        served.banks.unload(slot)
    num_bytes = served.banks.num_resident_bytes
    small = tiny_models.write_lora_adapter(
        tmp_path / "small", base, rank=5, keys=["self_attn.q_proj"], seed=9
    )
    assert served.load(small) == slot
    served.check_rows([slot, kept, 0, slot])
    assert served.banks.num_resident_bytes == num_bytes
    dora = served.load(adapters[2])
    served.check_rows([slot, dora, 0, kept])
    for used in (slot, dora, kept):
        served.banks.unload(used)
    np.testing.assert_array_equal(served.logits([0]), Served(base).logits([0]))
    assert served.banks.select([0, 0]) is None


@in_owner
def test_rows_outlive_the_loading_of_others(base: Path, adapters: list[Path]) -> None:
    """A batch goes on with what was selected for it, while banks grow and slots are freed."""
    import mlx.core as mx

    served = Served(base)
    slots = [served.load(path) for path in adapters[1:3]]
    rows = served.banks.select([*slots, 0])
    served.banks.use(rows)
    before = np.array(served.model(mx.array(PROMPTS)))
    for _ in range(2):
        others = [served.load(path) for path in adapters]
    served.banks.unload(others[0])
    np.testing.assert_array_equal(np.array(served.model(mx.array(PROMPTS))), before)


@in_owner
def test_64_adapters_take_5_percent_more_than_their_files(tmp_path: Path) -> None:
    import mlx.core as mx

    base = tiny_models.write_language_model(tmp_path / "base", hidden=64)
    path = tiny_models.write_lora_adapter(tmp_path / "adapter", base, rank=8)
    adapter = recognise(path)
    served = Served(base)
    before = mx.get_active_memory()
    for number in range(1, 81):
        assert served.load(path) == number
        in_files = number * adapter.weight_bytes
        if number >= 50:
            assert in_files <= served.banks.num_resident_bytes <= 1.05 * in_files
    assert mx.get_active_memory() - before <= 1.06 * in_files
    assert served.banks.num_bytes(adapter) == adapter.weight_bytes
    served.banks.unload(17)
    num_bytes, largest = served.banks.num_resident_bytes, adapter.weight_bytes
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    assert served.load(path) == 17
    assert served.banks.num_resident_bytes == num_bytes
    assert mx.get_peak_memory() - active < 4 * largest, "a slot is not written in place"
    served.check_rows([64, 0, 17, 1])


@pytest.mark.parametrize(
    ("arguments", "rank"), [({"rank": 3}, 4), ({"rank": 8, "dora": True}, 8), ({"rank": 33}, 64)]
)
@in_owner
def test_bytes_are_told_before_loading(
    tmp_path: Path, base: Path, arguments: dict[str, Any], rank: int
) -> None:
    assert padded_rank(arguments["rank"]) == rank
    path = tiny_models.write_lora_adapter(tmp_path / "adapter", base, **arguments)
    served = Served(base)
    num_bytes = served.banks.num_bytes(recognise(path))
    for _ in range(4):
        served.load(path)
    capacity = served.banks.num_resident_bytes / num_bytes
    assert capacity == int(capacity) >= 5


def damaged(adapter: Path, change: Callable[[dict[str, Any]], None]) -> Checkpoint:
    """An adapter whose file was replaced after it was recognised."""
    import mlx.core as mx

    checkpoint, path = recognise(adapter), adapter / "adapters.safetensors"
    tensors = {name: array + 0 for name, array in mx.load(str(path)).items()}
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors)
    return checkpoint


def add_a_tensor(tensors: dict[str, Any]) -> None:
    import mlx.core as mx

    tensors["model.layers.0.extra.lora_a"] = mx.zeros((2, 2))


def cut_a_tensor(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.self_attn.v_proj.lora_b"
    tensors[name] = tensors[name][:, 1:]


def spoil_a_tensor(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.self_attn.v_proj.lora_b"] *= float("nan")


def cut_magnitudes(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.self_attn.v_proj.m"] = tensors["model.layers.1.self_attn.v_proj.m"][1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_a_tensor, "nothing uses"),
        (cut_a_tensor, "trained on another base"),
        (spoil_a_tensor, "not finite"),
        (cut_magnitudes, "magnitudes"),
    ],
)
@in_owner
def test_a_failed_load_leaves_everything_as_before(
    tmp_path: Path,
    base: Path,
    adapters: list[Path],
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    served = Served(base)
    slots = [served.load(path) for path in adapters[:3]]
    before, num_bytes = served.logits([*slots, 0]), served.banks.num_resident_bytes
    bad = damaged(
        tiny_models.write_lora_adapter(tmp_path / "bad", base, rank=32, dora=True), change
    )
    with pytest.raises(PackagingError, match=message):
        served.banks.load("bad", bad)
    np.testing.assert_array_equal(served.logits([*slots, 0]), before)
    assert served.banks.num_resident_bytes == num_bytes
    assert served.load(adapters[3]) == len(slots) + 1


@in_owner
def test_a_scale_too_large_for_the_banks_is_refused(tmp_path: Path, base: Path) -> None:
    path = tiny_models.write_lora_adapter(tmp_path / "adapter", base, scale=1e3)
    scale_tensors(path / "adapters.safetensors", 1e37)
    with pytest.raises(PackagingError, match="not finite"):
        Served(base).load(path)


@in_owner
def test_an_adapter_that_makes_logits_infinite_is_unloaded(tmp_path: Path, base: Path) -> None:
    served = Served(base)
    good = served.load(tiny_models.write_lora_adapter(tmp_path / "good", base))
    before = served.logits([0, good])
    bad = tiny_models.write_lora_adapter(tmp_path / "bad", base, seed=3)
    scale_tensors(bad / "adapters.safetensors", 1e36)  # finite, also times the scale
    slot = served.load(bad)
    with pytest.raises(PackagingError, match="logits are not finite"):
        served.banks.try_out(slot, recognise(bad))
    np.testing.assert_array_equal(served.logits([0, good]), before)
    served.banks.try_out(good, recognise(tmp_path / "good"))
    again = tiny_models.write_lora_adapter(tmp_path / "again", base, seed=4)
    assert served.load(again) == slot
    served.check_rows([0, good, slot])


def scale_tensors(file: Path, factor: float) -> None:
    """Multiply the B matrices of mlx-lm's adapter."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    save_file(
        {k: v * np.float32(factor if k.endswith("lora_b") else 1) for k, v in tensors.items()}, file
    )


@in_owner
def test_what_is_no_adapter_of_this_base_is_refused(tmp_path: Path, base: Path) -> None:
    served = Served(base)
    for field, size, told in (
        ("hidden", 64, "belongs to another base model"),
        ("layers", 3, "does not fit .* layers up to 2"),
    ):
        other = tiny_models.write_language_model(tmp_path / field, **{field: size})
        path = tiny_models.write_lora_adapter(tmp_path / f"for {field}", other)
        with pytest.raises(PackagingError, match=told):
            served.load(path)
    zero = tiny_models.write_lora_adapter(tmp_path / "zero", base, zero=True)
    with pytest.raises(PackagingError, match="changes nothing"):
        served.load(zero)
    for call in (lambda: served.load(base), lambda: served.banks.num_bytes(recognise(base))):
        with pytest.raises(PackagingError, match="not an adapter"):
            call()
    with pytest.raises(PackagingError, match="cannot be read"):
        gone = recognise(tiny_models.write_lora_adapter(tmp_path / "gone", base))
        (tmp_path / "gone" / "adapters.safetensors").unlink()
        served.banks.load("gone", gone)
    assert served.banks.num_resident_bytes == 0


@in_owner
def test_an_output_layer_that_reads_the_weight_itself_is_refused(tmp_path: Path) -> None:
    """seed_oss multiplies by `embed_tokens.weight`: an adapter there would work by half."""
    base = tiny_models.write_language_model(
        tmp_path / "base", architecture="seed_oss", tie_word_embeddings=True
    )
    served = Served(base)
    path = tiny_models.write_lora_adapter(tmp_path / "a", base, keys=["model.embed_tokens"])
    with pytest.raises(PackagingError, match="past the adapter"):
        served.load(path)
    other = tiny_models.write_lora_adapter(tmp_path / "b", base, keys=["mlp.up_proj"])
    served.check_rows([served.load(other), 0])


@in_owner
def test_a_layer_that_gets_tokens_without_their_rows_is_refused() -> None:
    import mlx.core as mx
    from mlx import nn

    from mlops.engine.witness import Witness

    good, flat, bad, worse = (Witness(nn.Linear(4, 4)) for _ in range(4))
    x = mx.zeros((2, 3, 4))
    good(x)
    flat(x.reshape(6, 4))
    bad(x.swapaxes(0, 1))
    worse(x[0, 0])
    assert [witness.problem(2, 3) is None for witness in (good, flat, bad, worse)] == [
        True, True, False, False
    ]  # fmt: skip


def test_a_rank_that_nobody_uses_any_more_takes_no_memory(tmp_path: Path) -> None:
    base = tiny_models.write_language_model(tmp_path / "base")
    small = recognise(tiny_models.write_lora_adapter(tmp_path / "small", base, rank=4))
    large = recognise(tiny_models.write_lora_adapter(tmp_path / "large", base, rank=64))

    def check() -> None:
        from mlx_lm.utils import load_model

        banks = AdapterBanks(load_model(base)[0], recognise(base), "cpu")
        banks.load("small", small)
        before = banks.num_resident_bytes
        slot = banks.load("large", large)
        assert banks.num_resident_bytes > 10 * before
        banks.unload(slot)
        assert banks.num_resident_bytes == before

    run_in_owner(check)
