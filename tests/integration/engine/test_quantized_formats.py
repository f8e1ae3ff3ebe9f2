"""Models quantized by other tools: they load, and their logits are those of the weights that are
meant, which numpy works out here from each format's definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantized_models as packing
import tiny_models
from mlops import engine
from mlops.checkpoints import recognise
from quantized_models import Matrix, Packed

PROMPT = tuple(range(40, 72))
Tensors = dict[str, Matrix]

DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": tiny_models.vocabulary_size(),
    "hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "n_shared_experts": 1, "n_routed_experts": 4, "routed_scaling_factor": 1.0,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_language_model(tmp_path_factory.mktemp("plain"), hidden=64)


def read_tensors(folder: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def copy_with(plain: Path, folder: Path, tensors: Tensors, **settings: Any) -> Path:
    """The model in `plain` with other tensors and settings."""
    folder.mkdir()
    for path in plain.glob("token*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    packing.write_tensors(
        folder / "model.safetensors",
        tensors,
        {name: "F8_E4M3" for name in tensors if f"{name}_scale_inv" in tensors},
    )
    return folder


def logits(folder: Path, **options: Any) -> Matrix:
    loaded = engine.load_model(folder, enable_mps=False, **options)

    def compute() -> Matrix:
        import mlx.core as mx

        return np.array(loaded.model(mx.array([PROMPT])).astype(mx.float32))

    return engine.run_in_owner(compute)


def repack(
    tensors: Tensors, pack: Callable[[str, Matrix], Packed | None]
) -> tuple[Tensors, Tensors]:
    """Tensors packed as `pack` does for each matrix, and the plain ones that are meant."""
    packed: Tensors = {}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        found = pack(module, tensor.astype(np.float64)) if tensor.ndim == 2 else None
        if found is None:
            packed[name] = meant[name] = tensor
            continue
        packed |= {f"{module}.{part}": array for part, array in found[0].items()}
        meant[name] = found[1].astype(np.float32)
    return packed, meant


def compare(
    plain: Path, tmp_path: Path, pack: Any, tolerance: float = 2e-4, **settings: Any
) -> Path:
    packed, meant = repack(read_tensors(plain), pack)
    folder = copy_with(plain, tmp_path / "packed", packed, **settings)
    expected = logits(copy_with(plain, tmp_path / "meant", meant))
    np.testing.assert_allclose(logits(folder), expected, atol=tolerance, rtol=1e-3)
    # The packing was no identity: plain weights would be something else.
    assert np.abs(expected - logits(plain)).max() > 3 * tolerance
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_of_every_width(plain: Path, tmp_path: Path, bits: int) -> None:
    def pack(module: str, matrix: Matrix) -> Packed:
        codes, scales, biases = (part.astype(np.float32) for part in affine_parts(matrix, bits))
        meant = codes * np.repeat(scales, 32, 1) + np.repeat(biases, 32, 1)
        words = packing.pack_bits(codes.astype(np.int64), bits)
        return {"weight": words, "scales": scales, "biases": biases}, meant

    folder = compare(plain, tmp_path, pack, quantization={"bits": bits, "group_size": 32})
    article = "an" if bits == 8 else "a"
    assert recognise(folder).description.startswith(f"{article} {bits}-bit quantized llama")


def affine_parts(matrix: Matrix, bits: int) -> tuple[Matrix, Matrix, Matrix]:
    return packing.grouped_codes(matrix, bits, 32)


def float32(packed: Packed) -> Packed:
    """With scales as this model's other tensors are."""
    tensors, meant = packed
    return {
        name: array.astype(np.float32) if array.dtype == np.float64 else array
        for name, array in tensors.items()
    }, meant


def test_mixed_widths_and_plain_layers(plain: Path, tmp_path: Path) -> None:
    def pack(module: str, matrix: Matrix) -> Packed | None:
        if "embed_tokens" in module:
            return float32(packing.affine(matrix, 8))
        if "o_proj" in module:
            return None
        return float32(packing.affine(matrix, 6 if "layers.1" in module else 4))

    modules = {"model.embed_tokens": {"bits": 8, "group_size": 32}}
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down"):
        modules[f"model.layers.1.{part}_proj"] = {"bits": 6, "group_size": 32}
    folder = compare(plain, tmp_path, pack, quantization={"bits": 4, "group_size": 32, **modules})
    found = recognise(folder)
    assert found.quantization is not None
    assert found.quantization["mixed_bits"] == [4, 6, 8, 32]
    num_bytes = sum(tensor.nbytes for tensor in found.tensors.values())
    num_parameters = sum(tensor.size for tensor in read_tensors(plain).values())
    assert found.num_parameters == num_parameters
    bits_per_weight = round(8 * num_bytes / num_parameters, 1)
    words = f"mixed 4/6/8/32-bit ({bits_per_weight} bits per weight)"
    assert found.description.startswith(f"a {words} quantized llama language model")
    assert engine.load_model(folder, enable_mps=False).layout.endswith(f"from {words})")


def test_what_the_tensors_are_and_not_what_the_config_claims(plain: Path, tmp_path: Path) -> None:
    """8 bits in groups of 32 have the shapes of 4 bits in groups of 64, of a wider matrix."""
    folder = compare(
        plain,
        tmp_path,
        lambda module, matrix: float32(packing.affine(matrix, 8)),
        quantization={"bits": 4, "group_size": 64},
    )
    assert recognise(folder).description.startswith("an 8-bit quantized llama")


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_microscaling(plain: Path, tmp_path: Path, mode: str, key: str) -> None:
    bits, group_size = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[mode]
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "mode": mode}
    if key == "quantization_config" and mode != "nvfp4":
        settings = {"quant_method": mode}  # Transformers' settings; nvfp4's are mlx-lm's own here
    folder = compare(
        plain,
        tmp_path,
        lambda module, matrix: getattr(packing, mode)(matrix),
        **{key: settings},
    )
    assert f" {bits}-bit {mode} quantized llama" in recognise(folder).description


def test_awq(plain: Path, tmp_path: Path) -> None:
    def pack(module: str, matrix: Matrix) -> Packed | None:
        return packing.awq(matrix) if module.startswith("model.layers") else None

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    # mlx-lm casts every tensor to the scales' float16.
    folder = compare(plain, tmp_path, pack, tolerance=5e-3, quantization_config=settings)
    found = recognise(folder)
    assert "4-bit AWQ quantized llama" in found.description
    assert found.num_parameters == sum(tensor.size for tensor in read_tensors(plain).values())


def test_gpt_oss_as_its_makers_wrote_it(tmp_path: Path) -> None:
    """Two 4-bit numbers in a byte, gates and ups in turn."""
    plain = write_plain_gpt_oss(tmp_path / "plain")
    tensors = read_tensors(plain)
    packed: Tensors = {}
    meant = dict(tensors)
    for name, tensor in tensors.items():
        block, _, part = name.partition(".experts.")
        if not part.endswith("proj.weight"):
            if part not in ("gate_proj.bias", "up_proj.bias", "down_proj.bias"):
                packed[name] = tensor
            continue
        codes, scales, values = packing.fp4_codes(tensor.astype(np.float64), 32)
        meant[name] = values
        packed |= {f"{block}.{part}.codes": codes, f"{block}.{part}.scales": scales}
    for block in sorted({name.partition(".gate_proj.weight.codes")[0] for name in packed}):
        if f"{block}.gate_proj.weight.codes" not in packed:
            continue
        experts = f"{block}.experts"
        for name in ("gate_up_proj", "down_proj"):
            parts = ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]
            codes, scales = (
                np.stack([packed.pop(f"{block}.{one}.weight.{what}") for one in parts], 2)
                for what in ("codes", "scales")
            )
            codes, scales = (
                array.reshape(array.shape[0], -1, array.shape[-1]) for array in (codes, scales)
            )
            pairs = codes.reshape(*codes.shape[:2], -1, 16, 2)
            packed[f"{experts}.{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).astype(
                np.uint8
            )
            packed[f"{experts}.{name}_scales"] = scales
            biases = np.stack([tensors[f"{experts}.{one}.bias"] for one in parts], 2)
            packed[f"{experts}.{name}_bias"] = biases.reshape(biases.shape[0], -1)
    folder = copy_with(
        plain, tmp_path / "packed", packed, quantization_config={"quant_method": "mxfp4"}
    )
    expected = logits(copy_with(plain, tmp_path / "meant", meant))
    np.testing.assert_allclose(logits(folder), expected, atol=2e-4, rtol=1e-3)
    found = recognise(folder)
    assert "4-bit mxfp4 quantized gpt_oss" in found.description
    assert found.num_parameters == sum(tensor.size for tensor in tensors.values())


def write_plain_gpt_oss(folder: Path) -> Path:
    config = {
        "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "vocab_size": tiny_models.vocabulary_size(),
        "rms_norm_eps": 1e-5, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 128,
        "rope_theta": 10000.0,
    }  # fmt: skip
    return write_random(folder, config)


def write_random(folder: Path, config: dict[str, Any]) -> Path:
    """A model of mlx-lm's with random weights, under its own names."""
    from mlops.engine.mlx_lm import find_model_classes

    def make() -> Tensors:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        mx.random.seed(3)
        model_class, args_class = find_model_classes(config)
        model = model_class(args_class.from_dict(config))
        return {
            name: np.array(mx.random.normal(array.shape) * 0.2)
            for name, array in tree_flatten(model.parameters())
        }

    folder.mkdir()
    tiny_models.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    packing.write_tensors(folder / "model.safetensors", engine.run_in_owner(make))
    return folder


def test_fp8_of_an_architecture_that_mlx_lm_dequantizes(tmp_path: Path) -> None:
    plain = write_random(tmp_path / "plain", DEEPSEEK)

    def pack(module: str, matrix: Matrix) -> Packed | None:
        is_stored_so = module.endswith(("q_a_proj", "q_b_proj", "o_proj", "mlp.down_proj"))
        return packing.fp8_blocks(matrix) if is_stored_so else None

    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = compare(plain, tmp_path, pack, quantization_config=settings)
    assert "8-bit FP8 quantized deepseek_v3" in recognise(folder).description


def test_packed_compressed_tensors_of_an_architecture_that_mlx_lm_reads(tmp_path: Path) -> None:
    plain = write_random(tmp_path / "plain", DEEPSEEK)

    def pack(module: str, matrix: Matrix) -> Packed | None:
        if not module.endswith(("q_a_proj", "q_b_proj", "o_proj", "mlp.down_proj")):
            return None
        return packing.compressed_int4(matrix)

    weights = {"num_bits": 4, "symmetric": True, "type": "int", "group_size": 32}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    folder = compare(plain, tmp_path, pack, quantization_config=settings)
    found = recognise(folder)
    assert "4-bit compressed-tensors quantized deepseek_v3" in found.description
    assert found.num_parameters == sum(tensor.size for tensor in read_tensors(plain).values())
