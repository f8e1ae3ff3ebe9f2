"""What the servers of the `no_op` benchmark answer, and the plainest of the peers.

    python -m benchmarks.peers --port PORT

is the handler in bare FastAPI on uvicorn: one worker, no access log.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

ANSWER = {"prediction": "", "mlx_optimized": False, "model_type": "custom"}
NAMES = {"service_name": "bench", "project_name": "default"}
NUM_TOKENS = 64
"""Of a stream."""

EVENT = f"data: {json.dumps({'index': 0, 'text': ' word'})}\n\n"
PLAIN_BENTOML = f"""import bentoml

@bentoml.service(name="plain", workers=1)
class Plain:
    @bentoml.api
    async def predict(self, text: str, max_tokens: int) -> dict:
        return { ({**ANSWER, **NAMES})!r}
"""
"""The source of a service as BentoML's documentation has it."""

app = FastAPI()


class Body(BaseModel):
    """A request's."""

    text: str
    max_tokens: int


@app.post("/predict")
async def predict(body: Body) -> dict[str, Any]:
    """Answer at once."""
    return {**ANSWER, **NAMES}


@app.get("/readyz")
async def ready() -> str:
    """For whoever waits."""
    return "ready"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(app, port=parser.parse_args().port, log_level="warning", access_log=False)
