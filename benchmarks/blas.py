"""MLX on Linux CPU with an optimized BLAS in place, against MLX as its wheel installs.

Both sides run the same script: batch-16 decoding of a random Llama of 29M parameters in float32
with mlx-lm's own generator. One is started plainly, the other by `mlops run --`.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.report import Figure

DECODE = """
import json, time
import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs

args = ModelArgs(
    model_type="llama", hidden_size=512, num_hidden_layers=8, intermediate_size=1536,
    num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5, vocab_size=8192,
    tie_word_embeddings=True,
)
mx.random.seed(0)
model = Model(args)
mx.eval(model.parameters())
cache = model.make_cache() if hasattr(model, "make_cache") else None
if cache is None:
    from mlx_lm.models.cache import make_prompt_cache
    cache = make_prompt_cache(model)
tokens = mx.random.randint(0, 8192, (16, 32))
logits = model(tokens, cache=cache)
last = mx.argmax(logits[:, -1], axis=-1)
mx.eval(last)

def step(token):
    token = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
    mx.eval(token)
    return token

last = step(last)
start, steps = time.perf_counter(), 0
while steps < 8 or (time.perf_counter() - start < 2 and steps < 64):
    last = step(last)
    steps += 1
decode = 16 * steps / (time.perf_counter() - start)
a = mx.random.normal((1024, 1024))
mx.eval(a)
start = time.perf_counter()
mx.eval(a @ a)
print(json.dumps({"tokens_per_s": decode, "matmul_ms": 1000 * (time.perf_counter() - start)}))
"""


def run(runs: int) -> list[Figure]:
    """Measure both sides in turn; nothing to measure where MLX does not compute on the CPU."""
    from mlops import hardware

    if hardware.detect().mlx_backend != "cpu":
        return []
    ours, stock = [], []
    for _ in range(runs):
        ours.append(_measure(["mlops", "run", "--", sys.executable, "-c", DECODE]))
        stock.append(_measure([sys.executable, "-c", DECODE]))
    pairs = list(zip(ours, stock, strict=True))
    return [
        Figure(
            "batch-16 decode, 29M-parameter Llama, float32: times faster",
            "MLX as installed",
            [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs],
            floor=10,
            raw={
                "tokens_per_s": [one["tokens_per_s"] for one in ours],
                "stock_tokens_per_s": [one["tokens_per_s"] for one in stock],
            },
        ),
        Figure(
            "1024 x 1024 float32 matrix product: times faster",
            "MLX as installed",
            [b["matmul_ms"] / a["matmul_ms"] for a, b in pairs],
            raw={
                "ms": [one["matmul_ms"] for one in ours],
                "stock_ms": [one["matmul_ms"] for one in stock],
            },
        ),
    ]


def _measure(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured
