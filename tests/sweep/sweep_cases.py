"""The cases of the sweep: settings of tiny models, as keyword arguments of transformers' configs.

To add one, append to `CASES`. Every architecture that mlx-lm and transformers both have is in
`DEFAULTS`, or in `LEFT_OUT` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
"""What every configuration is given of these, where its class has the setting."""


@dataclass(frozen=True, eq=False)
class Case:
    """One tiny model.

    Attributes:
        architecture: the `model_type`.
        name: what is special about it.
        config: settings that its configuration gets beside `SIZES` and `DEFAULTS`.
    """

    architecture: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return DEFAULTS.get(self.architecture, {}) | self.config

    def __str__(self) -> str:
        return f"{self.architecture}-{self.name}"


DEFAULTS: dict[str, dict[str, Any]] = {
    name: {}
    for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "mixtral", "stablelm"
    )
}  # fmt: skip
"""What an architecture needs beside `SIZES` to be tiny."""

CASES: tuple[Case, ...] = (*(Case(architecture, "default") for architecture in DEFAULTS),)
