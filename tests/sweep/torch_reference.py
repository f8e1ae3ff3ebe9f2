"""Run by `.tools/reference`'s Python: what transformers and torch compute. It knows nothing of MLX.

Reads a JSON list of jobs, each a `folder` to write a tiny random model to, its `model_type`,
`sizes` (settings that the configuration is given as far as its class has them) and `config`
(settings that it is given in any case). Writes, for each job N, into one `.npz`: `logits-N`
(tokens, vocabulary), float32, and `tokens-N`, which greedy decoding adds; or `error-N`, a sentence,
where transformers makes no such model.

Usage: torch_reference.py JOBS.json RESULTS.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

GAIN = 1.4
"""Standard deviation of what a layer makes of inputs of 1, so that attention is not nearly even."""


def main(jobs_file: str, results_file: str) -> None:
    results: dict[str, Any] = {}
    for number, job in enumerate(json.loads(Path(jobs_file).read_text(encoding="utf-8"))):
        try:
            logits, tokens = compute(job)
        except Exception as exc:
            message = " ".join(f"{type(exc).__name__}: {exc}".split())
            results[f"error-{number}"] = np.array(message[:300])
            print(f"{job['model_type']}: {message}", file=sys.stderr)
            continue
        results[f"logits-{number}"] = logits
        results[f"tokens-{number}"] = tokens
    np.savez(results_file, **results)


@torch.inference_mode()
def compute(job: dict[str, Any]) -> tuple[Any, Any]:
    model = make_model(job["model_type"], job["sizes"], job["config"])
    model.save_pretrained(job["folder"])
    prompt, tokens = job["prompt"], list[int]()
    logits = predict(model, prompt)
    last = logits[-1]
    for _ in range(job["max_tokens"]):
        tokens.append(int(last.argmax()))
        last = predict(model, [*prompt, *tokens])[-1]
    return logits.numpy(), np.array(tokens)


def make_model(model_type: str, sizes: dict[str, Any], settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = make_config(CONFIG_MAPPING[model_type], sizes, settings)
    also_sees = hasattr(config, "text_config")
    is_text = not also_sees and type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.is_floating_point() and name in model.state_dict():
            randomise(name, parameter.data)
    model.tie_weights()
    return model


def make_config(kind: Any, sizes: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A configuration of those `sizes` that it has; those in it (`text_config`) get them too."""
    default = kind()
    known = {name: value for name, value in sizes.items() if has(default, name)}
    for name in ("text_config", "vision_config"):
        if has(default, name) and getattr(default, name) is not None:
            part = make_config(type(getattr(default, name)), sizes, settings.get(name) or {})
            known[name] = part.to_dict()
            settings = {key: value for key, value in settings.items() if key != name}
    return kind(**(known | settings))


def has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # it differs between layers
        return True


def randomise(name: str, data: Any) -> None:
    """Nothing is left at 0 or 1, where a part that is left out would not be noticed."""
    noise = torch.randn_like(data)
    if data.dim() >= 2 and data.numel() > max(data.shape):
        is_embedding = any(part in name for part in ("embed", "wte", "wpe"))
        fan_in = 1 if is_embedding else data[0].numel() if data.dim() == 2 else data.shape[-1]
        data.copy_(noise * GAIN / max(fan_in, 1) ** 0.5)
    else:
        data.add_(0.2 * noise)
    if name.endswith("correction_bias"):
        data.sub_(1.0)  # it chooses experts: their order stays, and no score is positive


def predict(model: Any, tokens: list[int]) -> Any:
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
