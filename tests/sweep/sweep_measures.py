"""What the table in docs/models.md says of an architecture, each column measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sweep_cases import LEFT_OUT, REFUSED
from sweep_references import PROMPT, Reference, compare

import tiny_models
from mlops.checkpoints import recognise
from mlops.engine.loading import LoadedModel, load_model
from mlops.engine.owner import run_in_owner
from mlops.errors import EngineError, PackagingError, ServiceError

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEADER = "| architecture | verified against torch | batched | adapters | quantized |"
SHARE = 1e-3
"""How far two computations of one model may be apart, of the spread of the logits."""


@dataclass(frozen=True)
class Row:
    """One line of the table; the columns' words are `yes`, `no`, or why not."""

    architecture: str
    verified: str
    batched: str = "–"
    adapters: str = "–"
    quantized: str = "–"

    def __str__(self) -> str:
        cells = (self.verified, self.batched, self.adapters, self.quantized)
        return f"| `{self.architecture}` | {' | '.join(cells)} |"


def measure(architecture: str, references: Sequence[Reference], folder: Path) -> Row:
    """Measure an architecture by its models, the first of which has default settings."""
    for reference in references:
        comparison = compare(load_model(reference.folder), reference)
        assert comparison.agrees, f"{reference.folder.name}: {comparison}"
    loaded = load_model(references[0].folder)
    return Row(
        architecture,
        "yes",
        _word(loaded.can_batch),
        _word(adapters_work(loaded, folder / f"{architecture}-adapter")),
        _word(quantized_works(loaded, folder / f"{architecture}-quantized")),
    )


def other_rows() -> list[Row]:
    """Of the architectures that there is nothing to measure of."""
    refused = [Row(name, f"refused: {reason}") for name, reason in REFUSED.items()]
    return refused + [Row(name, f"not compared: {reason}") for name, reason in LEFT_OUT.items()]


def render(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [HEADER, "|---|---|---|---|---|"]
    return "\n".join(lines + [str(row) for row in sorted(rows, key=lambda row: row.architecture)])


def table_of_page() -> str:
    lines = PAGE.read_text(encoding="utf-8").partition("\n## Table\n")[2].splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def write_page(rows: Sequence[Row]) -> None:
    """Put the table in the place of the one that is there."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(table_of_page(), render(rows)), encoding="utf-8")


def adapters_work(loaded: LoadedModel, folder: Path) -> bool:
    """A LoRA of all linear layers changes the output as the weights that it is fused into do."""
    base, plain = run_in_owner(_logits_and_plan, loaded)
    run_in_owner(_write_adapter, folder, plain)
    try:
        with_adapter = run_in_owner(_logits_with, loaded, folder)
    except (PackagingError, EngineError):
        return False
    fused = run_in_owner(_logits_fused, loaded, folder)
    return not _close(base, with_adapter) and _close(fused, with_adapter)


def quantized_works(loaded: LoadedModel, folder: Path) -> bool:
    """4-bit weights, saved as MLX does, give what the same weights dequantized give."""
    expected = run_in_owner(_quantize, loaded, folder)
    try:
        quantized = load_model(folder)
    except (PackagingError, ServiceError):
        return False
    return quantized.layout.startswith("float32 (deq") and _close(
        expected, run_in_owner(_logits, quantized.model)
    )


def _logits(model: Any) -> Any:
    import mlx.core as mx

    return np.array(model(mx.array([PROMPT[:32]]))[0].astype(mx.float32))


def _linears(model: Any) -> dict[str, Any]:
    """The projections of the layers; not what chooses experts."""
    from mlx import nn

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(part.isdigit() for part in name.split("."))
        and not {"gate", "router", "shared_expert_gate"} & set(name.split("."))
    }


def _logits_and_plan(loaded: LoadedModel) -> tuple[Any, dict[str, tuple[int, int]]]:
    shapes = {name: module.weight.shape for name, module in _linears(loaded.model).items()}
    return _logits(loaded.model), shapes


def _write_adapter(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    import mlx.core as mx

    folder.mkdir()
    mx.random.seed(3)
    weights = {}
    for name, (num_out, num_in) in shapes.items():
        weights[f"{name}.lora_a"] = mx.random.normal((num_in, 4)) * num_in**-0.5
        weights[f"{name}.lora_b"] = mx.random.normal((4, num_out)) * 0.2
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"scale": 1.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _logits_with(loaded: LoadedModel, adapter: Path) -> Any:
    banks = loaded.banks
    banks.use(banks.select([banks.load("adapter", recognise(adapter))]))
    try:
        return _logits(loaded.model)
    finally:
        banks.use(None)


def _logits_fused(loaded: LoadedModel, adapter: Path) -> Any:
    """In the model as it was loaded anew, the adapter added to the weights."""
    import mlx.core as mx

    from mlops.engine.loading import _load_weights

    model, _ = _load_weights(loaded.checkpoint)
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    for name, module in _linears(model).items():
        module.weight += (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
    return _logits(model)


def _quantize(loaded: LoadedModel, folder: Path) -> Any:
    """Save the model in 4 bits; returns the logits of these weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlops.engine.loading import _load_weights
    from mlops.hardware.open_files import open_file_limit_kept

    with open_file_limit_kept():
        from mlx_lm.utils import dequantize_model, quantize_model

    config = json.loads((loaded.checkpoint.path / "config.json").read_text(encoding="utf-8"))
    model, _ = _load_weights(loaded.checkpoint)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    tiny_models.write_tokenizer(folder)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return _logits(dequantize_model(model))


def _close(one: Any, other: Any) -> bool:
    return bool(np.abs(one - other).max() <= SHARE * (one.max() - one.min()))


def _word(works: bool) -> str:
    return "yes" if works else "no"
