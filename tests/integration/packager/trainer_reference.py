"""Run by `.tools/reference`'s Python: two trainings with transformers' Trainer, as people run them.

Usage: trainer_reference.py BASE FULL ADAPTER: trains the model in BASE for two steps, whole into
the folder FULL and as PEFT's adapter into ADAPTER, each with a checkpoint after every step.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


class Texts(torch.utils.data.Dataset[Any]):
    """A few rows of token ids."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(8) + 60 + index
        return {"input_ids": ids, "labels": ids}


def main(base: str, full: str, adapter: str) -> None:
    for folder in (full, adapter):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if folder == adapter:
            model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            folder, max_steps=2, save_steps=1, learning_rate=0.1, report_to=[], use_cpu=True
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Texts(),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        trainer.train()
        trainer.save_model()
        trainer.save_state()


main(*sys.argv[1:])
