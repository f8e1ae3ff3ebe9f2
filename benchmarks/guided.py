"""Answers that follow a JSON schema against free ones, over HTTP at 16 clients.

One server of ours with the random Llama of 29M parameters; in a run both kinds are asked in turn,
free answers as long as those with a schema are on average. Every answer with a schema is checked.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.clients import Round, ask_all
from benchmarks.models import make_prompts, write_models
from benchmarks.report import Figure
from benchmarks.servers import MAX_ROWS, mlops_server

NUM_CLIENTS = 16
NUM_REQUESTS = 48
MAX_TOKENS = 400
TURNS = 2
"""Of both kinds within a run."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "kind": {"enum": ["question", "complaint", "praise"]},
        "urgency": {"type": "integer", "minimum": 1, "maximum": 5},
        "is_customer": {"type": "boolean"},
        "steps": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "action": {"type": "string", "maxLength": 40},
                    "minutes": {"type": "integer", "minimum": 0, "maximum": 90},
                },
                "required": ["action", "minutes"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "kind", "urgency", "is_customer", "steps"],
    "additionalProperties": False,
}
GUIDED = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "ticket", "schema": SCHEMA, "strict": True},
    }
}


def run(runs: int) -> list[Figure]:
    """Ask for both kinds in turn."""
    guided, free = [], []
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as name:
        folder = Path(name)
        write_models(folder, 0)
        with mlops_server(folder / "ours", folder / "base", max_batch_size=MAX_ROWS) as port:
            length = _length(_ask(port, "warm-up", GUIDED))
            _ask(port, "warm-up, free", None, length)
            for number in range(runs):
                seeds = [f"run {number}, turn {turn}" for turn in range(TURNS)]
                rounds = [(_ask(port, s, GUIDED), _ask(port, s, None, length)) for s in seeds]
                guided.append(statistics.mean(one.tokens_per_s for one, _ in rounds))
                free.append(statistics.mean(other.tokens_per_s for _, other in rounds))
    return [
        Figure(
            f"JSON schema, {NUM_CLIENTS} clients, tokens/s: part",
            "free answers",
            [a / b for a, b in zip(guided, free, strict=True)],
            floor=0.85,
            aim=0.95,
            raw={"tokens_per_s": guided, "free_tokens_per_s": free, "tokens": [float(length)]},
        )
    ]


def _ask(
    port: int, seed: str, fields: dict[str, Any] | None, max_tokens: int = MAX_TOKENS
) -> Round:
    answers = ask_all(
        port,
        make_prompts(seed, NUM_REQUESTS),
        lambda _: {"model": "base"},
        num_clients=NUM_CLIENTS,
        max_tokens=max_tokens,
        fields=fields,
    )
    if fields is not None:
        for answer in answers.answers:
            jsonschema.validate(json.loads(answer.text), SCHEMA)
    return answers


def _length(answered: Round) -> int:
    return round(statistics.mean(answer.num_tokens for answer in answered.answers))
