"""Run by `.tools/reference`'s Python: what torch and PEFT compute. It knows nothing of MLX.

Reads a JSON list of jobs: `base` (a folder), `prompt` (token ids), `max_tokens`, `adapter`
(a folder, or null), `save` (null for an adapter that is there, or the fields of the `LoraConfig` of
one that PEFT is to make, fill with random numbers and save) and `save_embedding_layers`. Writes
`logits-N` (tokens, vocabulary), float32, and `tokens-N`, which greedy decoding adds, of every job
into one `.npz`. A job with `names_of` (a folder with a `config.json`) has only `names-N`, JSON: the
modules of torch's model that LoRA can change, by name, with the shape of their weight.

Usage: peft_reference.py JOBS.json RESULTS.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def main(jobs_file: str, results_file: str) -> None:
    results = {}
    for number, job in enumerate(json.loads(Path(jobs_file).read_text(encoding="utf-8"))):
        if "names_of" in job:
            results[f"names-{number}"] = np.array(json.dumps(module_names(job["names_of"])))
            continue
        if job["save"] is not None:
            save_adapter(job["base"], job["adapter"], job["save"], job["save_embedding_layers"])
        model = load_base(job["base"])
        if job["adapter"] is not None:
            model = PeftModel.from_pretrained(model, job["adapter"])
        with torch.inference_mode():
            logits = model(torch.tensor([job["prompt"]])).logits[0]
            tokens = decode(model, job["prompt"], job["max_tokens"])
        results[f"logits-{number}"] = logits.numpy()
        results[f"tokens-{number}"] = np.array(tokens)
    np.savez(results_file, **results)


def module_names(folder: str) -> dict[str, list[int]]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: list(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)
    }


def load_base(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    return model.eval()


def save_adapter(
    base: str, folder: str, config: dict[str, Any], save_embedding_layers: bool | str
) -> None:
    """What PEFT writes after training, all its parameters moved away from where they began."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.8 + 0.4 * torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn_like(parameter))  # in place: some are tied
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)


def decode(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedily, each token from the whole text before it."""
    tokens: list[int] = []
    for _ in range(max_tokens):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
