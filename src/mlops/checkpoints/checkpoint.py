"""What was recognised on disk, as plain records that every other layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Any

from mlops.checkpoints.pooling import Pooling
from mlops.checkpoints.rope import Rope
from mlops.counts import count

CONTEXT_TOKENS = "max_context_tokens"
"""Our own key in `Checkpoint.model_config`: the most tokens that are computed as they were
trained."""


class CheckpointKind(StrEnum):
    """What a checkpoint is, and so what can be done with it."""

    LANGUAGE_MODEL = "language_model"
    ADAPTER = "adapter"
    PYTORCH = "pytorch"
    ONNX = "onnx"
    COREML = "coreml"
    MLX_FUNCTION = "mlx_function"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: as safetensors writes it: `F32`, `BF16`, `U32`, …
        shape: as stored, so packed for a quantized tensor.
        file: name of the weight file, relative to the checkpoint.
        offset: position of the first byte in that file.
        nbytes: length in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of stored elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class AdapterModule:
    """The low-rank update of one module of the base model.

    The update of a linear layer is `scale * (x @ A @ B)` with A `(in, rank)` and B `(rank, out)`.
    For an embedding `in` counts its rows, for stacked experts A and B have one matrix each.

    Attributes:
        name: path of the module in the base model: `model.layers.0.self_attn.q_proj`.
        rank: taken from the tensors.
        scale: factor of the update; `alpha / rank` is already worked out.
        key_a, key_b: names of the tensors A and B in `file`.
        key_m: name of DoRA's magnitude, shape `(out,)` (an embedding: its rows), or None.
        file: absolute path of the safetensors file.
        transposed: the tensors are stored as A `(rank, in)` and B `(out, rank)`; with
            `num_experts`, as `(num_experts, rank, in)` and `(num_experts, out, rank)`.
        num_experts: for the stacked experts of a mixture, else None.
        is_side_by_side: the experts' matrices are not stacked but lie side by side, as PEFT has
            them: A `(num_experts * rank, in)`, an expert after the other, and B
            `(out, rank * num_experts)`, all experts for each of the rank.
    """

    name: str
    rank: int
    scale: float
    key_a: str
    key_b: str
    key_m: str | None
    file: Path
    transposed: bool
    in_features: int
    out_features: int
    num_experts: int | None = None
    is_side_by_side: bool = False


@dataclass(frozen=True)
class Part:
    """What the tensors of one `AdapterModule` are for one module of mlx-lm's model.

    Attributes:
        expert: whose they are, among stacked experts; None: all of theirs, or there are none.
        outputs: which of the values that they give are this module's; None: all.
        is_reversed: A has the outputs and B the inputs.
    """

    module: AdapterModule
    expert: int | None = None
    outputs: slice | None = None
    is_reversed: bool = False


@dataclass(frozen=True)
class Update:
    """All that an adapter does to one module of mlx-lm's model.

    Attributes:
        name: of the module; for a tied output layer what the adapter calls it.
        parts: one, unless experts have tensors of their own.
        num_experts: of the module, when it holds stacked experts, else None.
        embedding: name of the embedding that is used as this output layer, else None.
    """

    name: str
    parts: tuple[Part, ...]
    num_experts: int | None = None
    embedding: str | None = None

    @property
    def place(self) -> str:
        """Name of the layer in the model."""
        return self.name if self.embedding is None else self.embedding

    @property
    def rank(self) -> int:
        """The highest of any part."""
        return max(part.module.rank for part in self.parts)

    @property
    def in_features(self) -> int:
        part = self.parts[0]
        return part.module.out_features if part.is_reversed else part.module.in_features

    @property
    def out_features(self) -> int:
        part = self.parts[0]
        num_out = part.module.in_features if part.is_reversed else part.module.out_features
        return len(range(num_out)[part.outputs or slice(None)])

    @property
    def key_m(self) -> str | None:
        """Name of DoRA's magnitude, or None."""
        return self.parts[0].module.key_m


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter changes.

    Attributes:
        format: `mlx-lm` or `peft`.
        fine_tune_type: `lora` or `dora`.
        base_model: what the adapter names as its base: a path, a hub id, or None.
        modules: by module name.
        copies: names of tensors that are copies of the base's weights, by module name. PEFT saves
            them beside an adapter of an embedding or an output layer.
    """

    format: str
    fine_tune_type: str
    base_model: str | None
    modules: Mapping[str, AdapterModule]
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        return max(module.rank for module in self.modules.values())

    @property
    def description(self) -> str:
        """`a rank-8 LoRA adapter of 14 modules`."""
        kind = {"lora": "LoRA", "dora": "DoRA"}[self.fine_tune_type]
        return f"a rank-{self.rank} {kind} adapter of {count(len(self.modules), 'module')}"


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint. Only headers were read.

    Attributes:
        path: absolute path of the folder or file.
        kind, framework: what it is; `framework` is a `ModelFramework` value: `mlx`,
            `transformers`, `pytorch`, `onnx` or `coreml`. A language model that was saved by MLX
            is `mlx`, any other `transformers`; mlx-lm loads both.
        format: `mlx`, `transformers`, `mlx-lm adapter`, `peft adapter`, `pt2`, `onnx`,
            `mlpackage`, `mlmodel` or `mlxfn`.
        architecture: `model_type` of the configuration, or None.
        quantization: None for plain weights, else as the tensors are: `bits` and `group_size` of
            most weights, `mode` (`affine`, `mxfp4`, `awq`, …), `bits_per_weight` of all, scales
            counted, and `mixed_bits` where several widths are used; `describe_quantization` says
            it in words.
        num_parameters: as the model counts them, so unpacked; None when no header tells.
        weight_bytes: bytes of all tensors, or of the weight files without a header to read.
        dtypes: of the stored tensors, sorted.
        tensors: by name; empty without a header to read.
        weight_files: names relative to `path`, sorted; for a single file its own name.
        has_tokenizer: a tokenizer lies beside the weights.
        config: content of `config.json` or `adapter_config.json`, else empty.
        adapter: what an adapter changes, else None.
        pooling: how a model made for embeddings gives them, else None.
        is_headless: the names in the weight files lack the `model.` that a model with an output
            layer has; the names in `tensors` have it.
        model_config: what mlx-lm is given in place of what `config.json` says, where it would not
            read that: the same settings by the names that it knows.
        ropes: rotary embeddings that mlx-lm cannot be told of, of each layer (None: the layer keeps
            its own), or one for all; empty when mlx-lm's are right.
        files: names relative to `path` of all that it consists of, sorted: what is checked, hashed,
            stored and loaded.
        left_out: what else lies in the folder, sorted: names of files, and of folders with how many
            files they hold (`checkpoint-50/ (5 files)`).
        warnings: what its user should know, a sentence each; nothing in them keeps it from
            being served as it was trained.
        description: one phrase for people.
    """

    path: Path
    kind: CheckpointKind
    format: str
    framework: str
    description: str
    weight_files: tuple[str, ...]
    weight_bytes: int
    architecture: str | None = None
    quantization: Mapping[str, Any] | None = None
    num_parameters: int | None = None
    dtypes: tuple[str, ...] = ()
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    has_tokenizer: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter: AdapterInfo | None = None
    pooling: Pooling | None = None
    is_headless: bool = False
    model_config: Mapping[str, Any] = field(default_factory=dict)
    ropes: tuple[Rope | None, ...] = ()
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def size_of_model(num_parameters: int) -> str:
    """`29.4M` for 29,400,000 parameters."""
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if num_parameters >= factor:
            return f"{num_parameters / factor:.1f}{letter}"
    return str(num_parameters)
