"""A service for `bentoml serve` whose answers go on until the test opens a gate, a file.

A prompt that is a number asks for so many tokens instead, gate or not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GATE_VARIABLE = "TEST_GATE"
PAUSE_VARIABLE = "TEST_PAUSE_S"
"""Between two tokens."""

PADDING_VARIABLE = "TEST_PADDING_BYTES"
"""What is added to the text of each token."""

_SERVICE = """
import asyncio
import os

from mlops.serving.bentoml.service import create_bentoml_service
from mlops.serving.runner.base import TextChunk


PAUSE_S = float(os.environ.get("TEST_PAUSE_S", "0.01"))
PADDING = "." * int(os.environ.get("TEST_PADDING_BYTES", "0"))


class Gated:
    def __init__(self, prompt):
        self.num_tokens = int(prompt) if prompt.isdigit() else None
        self.is_cancelled = False

    def goes_on(self, number):
        if self.num_tokens is not None:
            return number < self.num_tokens
        return not os.path.exists(os.environ["TEST_GATE"])

    def cancel(self):
        self.is_cancelled = True

    async def begun(self):
        pass

    async def chunks(self):
        number = 0
        while self.goes_on(number) and not self.is_cancelled:
            yield TextChunk(0, f" {number}{PADDING}", (number,))
            number += 1
            await asyncio.sleep(PAUSE_S)
        yield TextChunk(0, " end", (0,), "cancelled" if self.is_cancelled else "stop")

    async def prediction(self):
        async for _ in self.chunks():
            pass
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {"prediction": " end", "finish_reason": "stop", "usage": usage}


class GatedRunner:
    can_generate = True

    def __init__(self, model_path):
        self.is_loaded = False

    def load_model(self):
        self.is_loaded = True

    def generate(self, input_data, *, deadline_s=None):
        return Gated(str(input_data.get("prompt")))

    def token_bytes(self, token_ids, adapter=None):
        return [b"" for _ in token_ids]

    def statistics(self):
        return {}

    def predict(self, input_data):
        return {}

    def predict_batch(self, inputs):
        return [{} for _ in inputs]

    def get_memory_usage(self):
        return {"total_mb": 1.0}

    def unload_model(self):
        self.is_loaded = False


svc = create_bentoml_service("model", "gated", runner_class=GatedRunner)
"""


def write_gated_service(folder: Path) -> Path:
    """Write `service.py` and what it needs; returns the path of the gate, which is shut."""
    (folder / "service.py").write_text(_SERVICE)
    (folder / "model").mkdir()
    return folder / "gate"


def request(path: str = "/v1/completions", **fields: Any) -> bytes:
    """The bytes of one request on a connection that may be kept."""
    asked = {"model": "gated", "prompt": "count", **fields}
    body = json.dumps({name: value for name, value in asked.items() if value is not None}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
