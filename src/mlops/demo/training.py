"""LoRA fine-tuning with mlx-lm's own trainer, tracked in MLflow."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops import hardware
from mlops.demo.lessons import Lesson, conversations
from mlops.hardware.open_files import open_file_limit_kept

if TYPE_CHECKING:
    from mlops.client import TrackingClient
    from mlops.registry import StoredModel

Report = Callable[[int, float], None]
"""Called with the iteration and the training loss there."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one fine-tuning; the defaults suit the demo's own 3M-parameter model."""

    rank: int = 16
    scale: float = 2.0
    num_layers: int = -1
    iterations: int = 40
    batch_size: int = 4
    learning_rate: float = 3e-4
    max_tokens: int = 256
    seed: int = 0


def train_adapter(
    base: StoredModel,
    lesson: Lesson,
    recipe: Recipe,
    folder: Path,
    *,
    data: Path,
    client: TrackingClient,
    report: Report,
) -> None:
    """Train one adapter on `base` and write it to `folder` in mlx-lm's format.

    A run of `client` gets the loss, the recipe and the base as parameters, the lessons as its
    dataset, and the adapter. The folder appears when training is complete.

    Args:
        base: an entry of the model store.
        data: file for the lessons, in the form that mlx-lm's trainer reads.
    """
    hardware.ensure_blas()
    hardware.select_device()
    import mlx.core as mx
    import mlx.optimizers
    import numpy

    with open_file_limit_kept():
        from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
        from mlx_lm.tuner.trainer import TrainingArgs, train
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load

    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    chats = conversations(lesson)
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(f"{json.dumps(chat)}\n" for chat in chats), encoding="utf-8")
    lora = {"rank": recipe.rank, "scale": recipe.scale, "dropout": 0.0}
    mx.random.seed(recipe.seed)
    numpy.random.seed(recipe.seed)  # mlx-lm shuffles with it
    model, tokenizer = load(str(base.path))
    if hardware.detect().mlx_backend == "cpu":
        model.set_dtype(mx.float32)  # the only type that MLX's CPU kernels multiply fast
        mx.disable_compile()  # building the kernels takes longer than these few steps
    model.freeze()
    num_layers = recipe.num_layers if recipe.num_layers > 0 else len(model.layers)
    linear_to_lora_layers(model, num_layers, lora)
    config = {
        "fine_tune_type": "lora",
        "model": str(base.path),
        "num_layers": num_layers,
        "lora_parameters": lora,
    }
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=1))
    with client.start_run(run_name=f"lora-{lesson.name}", tags={"lesson": lesson.style}):
        client.log_params({"adapter": lesson.name, **asdict(recipe)})
        client.log_params({"base_model": base.tag, "base_model_digest": base.digest})
        client.log_input(data, f"lessons-{lesson.name}")
        with contextlib.redirect_stdout(io.StringIO()):
            train(
                model=model,
                optimizer=mlx.optimizers.Adam(learning_rate=recipe.learning_rate),
                train_dataset=CacheDataset(ChatDataset(chats, tokenizer, mask_prompt=True)),
                args=TrainingArgs(
                    batch_size=recipe.batch_size,
                    iters=recipe.iterations,
                    steps_per_report=5,
                    steps_per_save=recipe.iterations,
                    max_seq_length=recipe.max_tokens,
                    adapter_file=str(partial / "adapters.safetensors"),
                ),
                training_callback=_Tracked(client, report),
            )
        for checkpoint in partial.glob("0*_adapters.safetensors"):
            checkpoint.unlink()
        client.log_model(partial, lesson.name, copy=True)  # packaging finds the run by its digest
    shutil.rmtree(folder, ignore_errors=True)  # trained before, but not in this MLflow
    partial.rename(folder)


class _Tracked:
    """What mlx-lm's trainer calls at every report: the loss goes to MLflow and to the screen."""

    def __init__(self, client: TrackingClient, report: Report) -> None:
        self.client = client
        self.report = report

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        iteration, loss = int(train_info["iteration"]), float(train_info["train_loss"])
        self.client.log_metrics(
            {"train_loss": loss, "tokens_per_second": float(train_info["tokens_per_second"])},
            step=iteration,
        )
        self.report(iteration, loss)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """There is no validation set."""
