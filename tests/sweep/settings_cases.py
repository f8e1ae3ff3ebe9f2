"""Settings other than the default, and what becomes of each: computed, held to a window, refused.

To add one, append to `COMPUTED`, `CAPPED` or `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sweep_cases import Case

_SLIDING = ["sliding_attention", "full_attention"]
_TWO = {"num_hidden_layers": 2}
_ORDER = _TWO | {"layer_types": _SLIDING, "sliding_window": 8}

COMPUTED = (
    Case("llama", "attention_bias", {"attention_bias": True, "mlp_bias": True}),
    Case("granite", "factors", {"logits_scaling": 3.0, "residual_multiplier": 0.4}),
    Case("cohere", "logit_scale", {"logit_scale": 0.3}),
    Case("seed_oss", "no_attention_bias", {"attention_bias": False}),
    Case("qwen2", "window_unused", {"sliding_window": 8, "use_sliding_window": False}),
    Case("gemma3_text", "windows", _ORDER),
    Case("gemma3_text", "no_windows", _TWO | {"layer_types": ["full_attention"] * 2}),
    Case("cohere2", "windows", _ORDER),
    Case(
        "falcon_h1",
        "multipliers",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "attention_in_multiplier": 1.7,
            "key_multiplier": 0.4,
        },
    ),
)
"""mlx-lm reads it, or is told by another name."""

CAPPED = (
    *(
        Case(architecture, "window", {"sliding_window": 32})
        for architecture in ("mistral", "mixtral", "gemma2", "phi3", "starcoder2", "ministral3")
    ),
    *(
        Case(
            architecture,
            "window",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1},
        )
        for architecture in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
    ),
    Case("mistral3", "window", {"sliding_window": 32}),
    Case("mistral", "windows_only", {"sliding_window": 32, "layer_types": [_SLIDING[0]] * 2}),
)
"""mlx-lm has no such window: the context ends with it."""

REFUSED = {
    **{
        Case(architecture, name, {name: "relu"}): name
        for name, architectures in {
            "hidden_act": "llama mistral mixtral qwen2 qwen3 phi phi3 gemma starcoder2 olmo2",
            "hidden_activation": "gemma2",
        }.items()
        for architecture in architectures.split()
    },
    Case("gpt2", "activation", {"activation_function": "relu"}): "activation_function",
    Case("gpt2", "no_scale", {"scale_attn_weights": False}): "scale_attn_weights",
    Case("gpt2", "layer_scale", {"scale_attn_by_inverse_layer_idx": True}): "inverse_layer_idx",
    Case("olmoe", "clip", {"clip_qkv": 0.5}): "clip_qkv",
    Case("phi", "norm", {"qk_layernorm": True}): "qk_layernorm",
    Case("qwen3", "bias", {"attention_bias": True}): "attention_bias",
    Case("mamba", "epsilon", {"layer_norm_epsilon": 0.1}): "layer_norm_epsilon",
    Case("gemma3_text", "cap", _ORDER | {"final_logit_softcapping": 1.0}): (
        "final_logit_softcapping"
    ),
    Case("qwen2_moe", "norm", {"norm_topk_prob": True}): "norm_topk_prob",
    Case("deepseek_v3", "one_expert", {"num_experts_per_tok": 1}): "num_experts_per_tok is 1",
    Case("qwen2_moe", "step", {"decoder_sparse_step": 2}): "decoder_sparse_step",
    Case("mamba2", "groups", {"num_heads": 8, "head_dim": 16, "n_groups": 2}): "n_groups",
    Case(
        "gemma3_text", "order", _ORDER | {"layer_types": [_SLIDING[1], _SLIDING[0]]}
    ): "layer_types in config.json",
}
"""mlx-lm computes something else; the words that the refusal has."""

_LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
_GEMMA_3 = {
    "layer_types": _SLIDING * 2,
    "sliding_window": 32,
    "rope_parameters": {
        "full_attention": _LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def _without_parts(config: dict[str, Any]) -> dict[str, Any]:
    """As Qwen2-VL was published: the text part's settings at the top."""
    text = config.pop("text_config")
    return text | config


def _without_types(config: dict[str, Any]) -> dict[str, Any]:
    """As Gemma 3 was published: one in so many layers sees all, and has `rope_scaling`."""
    text = config.get("text_config", config)
    for name in ("layer_types", "rope_parameters", "_sliding_window_pattern"):
        text.pop(name, None)
    text |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2}
    return config


EARLIER: dict[Case, Callable[[dict[str, Any]], dict[str, Any]]] = {
    Case("qwen2_vl", "default"): _without_parts,
    Case("gemma3_text", "published", _GEMMA_3): _without_types,
    Case("gemma3", "published", _GEMMA_3): _without_types,
}
"""The same models, as earlier transformers wrote their settings."""

SAMPLE = ("mistral-window", "gemma3_text-no_windows", "llama-hidden_act", "mamba-epsilon")
"""What `make test` runs of all of these."""
