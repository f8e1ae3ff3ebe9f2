"""Makes the sweep's models with transformers, and compares what mlx-lm computes of them with torch.

cases -> one process of torch: saved models, logits, tokens -> `load_model`, as a service does
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sweep_cases import SIZES, Case

import tiny_models
from mlops.engine.loading import LoadedModel
from mlops.engine.owner import run_in_owner
from torch_process import run_in_torch

PROMPT = tuple(int(token) for token in np.random.default_rng(0).integers(0, 256, 200))
MAX_TOKENS = 8
TOLERANCE = 3e-4
"""Of the spread of torch's logits, for the worst of all: rounding makes 1e-5, and what some classes
make of GELU, with tanh in place of the error function, 1e-4."""


@dataclass(frozen=True)
class Reference:
    """A tiny model and what torch computes with it.

    Attributes:
        folder: as transformers saved it, with a tokenizer.
        logits: of `PROMPT`, (tokens, vocabulary), float32.
        tokens: `MAX_TOKENS` that greedy decoding adds.
        error: why transformers makes no such model; then there are no logits.
    """

    folder: Path
    logits: Any
    tokens: tuple[int, ...]
    error: str


@dataclass(frozen=True)
class Comparison:
    """How far mlx-lm's logits are from torch's.

    Attributes:
        error: the largest difference, relative to the spread (largest less smallest) of all logits.
        argmax: share of positions with the same likeliest token.
        same_tokens: greedy decoding with caches adds the same.
    """

    error: float
    argmax: float
    same_tokens: bool

    @property
    def agrees(self) -> bool:
        return self.error <= TOLERANCE and self.same_tokens

    def __str__(self) -> str:
        tokens = "same" if self.same_tokens else "other"
        return f"error {self.error:.1e}, argmax {self.argmax:.1%}, {tokens} tokens"


def make_references(cases: Iterable[Case], folder: Path) -> dict[Case, Reference]:
    """Let transformers make and compute all models, in one process."""
    cases = list(cases)
    tokenizer = tiny_models.write_tokenizer(folder / "tokenizer")
    jobs = [
        {
            "folder": str(folder / str(case)),
            "model_type": case.architecture,
            "sizes": SIZES,
            "config": case.settings,
            "prompt": PROMPT,
            "max_tokens": MAX_TOKENS,
        }
        for case in cases
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("torch_reference.py")
    run_in_torch(script, folder / "jobs.json", folder / "results.npz", timeout_s=1800)
    results = np.load(folder / "results.npz")
    references = {}
    for number, (case, job) in enumerate(zip(cases, jobs, strict=True)):
        if f"error-{number}" in results:
            error = str(results[f"error-{number}"])
            references[case] = Reference(Path(job["folder"]), None, (), error)
            continue
        shutil.copytree(tokenizer, job["folder"], dirs_exist_ok=True)
        logits, tokens = results[f"logits-{number}"], results[f"tokens-{number}"]
        references[case] = Reference(Path(job["folder"]), logits, tuple(tokens.tolist()), "")
    return references


def compare(loaded: LoadedModel, reference: Reference) -> Comparison:
    logits, tokens = run_in_owner(_compute, loaded.model)
    logits = logits[:, : reference.logits.shape[-1]]
    spread = reference.logits.max() - reference.logits.min()
    error = np.abs(logits - reference.logits).max() / spread
    same = logits.argmax(axis=-1) == reference.logits.argmax(axis=-1)
    error = float(np.nan_to_num(error, nan=np.inf))
    return Comparison(error, float(same.mean()), tokens == reference.tokens)


def _compute(model: Any) -> tuple[Any, tuple[int, ...]]:
    """Logits of `PROMPT`, and what greedy decoding adds, each token through the caches."""
    import mlx.core as mx

    from mlops.engine.prefill import new_caches

    caches = new_caches(model)
    logits = model(mx.array([PROMPT]), cache=caches)[0].astype(mx.float32)
    tokens, last = [], logits[-1]
    for _ in range(MAX_TOKENS):
        tokens.append(int(last.argmax()))
        last = model(mx.array([[tokens[-1]]]), cache=caches)[0, -1]
    return np.array(logits), tuple(tokens)
