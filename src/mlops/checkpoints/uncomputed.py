"""Settings that transformers' model reads and mlx-lm's does not, and that change the result.

What each library reads comes from its sources (`library_sources`); the tables here hold what those
do not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlops.checkpoints.language_settings import ROTARY, WINDOWS, LanguageModel, as_number, shown
from mlops.checkpoints.library_sources import UNKNOWN

_HARMLESS = {
    "ours, and what is private": r"max_context_tokens|_.*",
    "training": (
        r".*(dropout|pdrop|_drop).*|.*initializer.*|.*init_(std|method|scale|scheme|floor).*"
        r"|.*(aux_loss|_loss|z_loss|jitter|regulari).*|.*_init|rescale_prenorm_residual"
        r"|time_step_(min|max|floor|scale|init_scheme)|linear_(a_log|dt)_(min|max)|seq_aux"
        r"|(final_)?w_init_variance_scale|gradient_checkpointing|finetuning_task|unsloth.*"
    ),
    "what transformers' functions return, and how they are called": (
        r"output_\w+|return_dict\w*|use_cache|use_return_dict|is_encoder_decoder"
        r"|cross_attention_hidden_size|chunk_size_feed.*|torchscript|tf_legacy.*|pruned_heads"
        r"|cache_implementation|num_logits_to_keep|keys_to_ignore.*|gguf_file"
    ),
    "the tokenizer's": (
        r"(.*_)?token_(id|index)|.*token_ids|prefix|suffix|vocab_size|tokenizer_class|n_special"
        r"|predict_special_tokens|sep_token"
    ),
    "names and versions": (
        r"architectures|model_type|auto_map|.*dtype|transformers.*|.*version|name_or_path|task\w*"
        r"|is_llama_config"
    ),
    "classification": r"id2label|label2id|num_labels|problem_type|classifier\w*|summary_\w+",
    "other parts than the language model, heads that predict further tokens": (
        r"(text|vision|audio|video|speech|image|mm|projector|multimodal)_\w+|mtp_\w+"
        r"|num_mtp_layers|num_nextn_predict_layers"
    ),
    "quantization, which is read elsewhere": r"quantization.*",
    "precision and speed": (
        r"residual_in_fp32|\w*softmax_in_fp32|reorder_and_upcast_attn|fp32_\w+|use_bfloat16"
        r"|use_(mamba_kernels|mambapy|associative_scan|flash_attn\w*|fused\w*|kernels?)"
        r"|attn_implementation|(mamba_)?chunk_size|block_size|pretraining_tp|ep_size"
    ),
    "defaults for sampling": (
        r"max_length|min_length|do_sample|temperature|top_[kp]|num_beams\w*|repetition_penalty"
        r"|typical_p|length_penalty|no_repeat_ngram_size|bad_words_ids|num_return_sequences"
        r"|diversity_penalty|encoder_no_repeat_ngram_size|early_stopping|begin_suppress_tokens"
        r"|suppress_tokens|remove_invalid_values|exponential_decay_length_penalty|max_new_tokens"
    ),
    "lengths of the context, by names that do not decide": (
        r"seq_length|initial_context_length|max_seq_len\w*|max_sequence_length|model_max_length"
        r"|n_ctx|n_positions|max_window_layers"
    ),
    "written into published files, and read by no model": (
        r"rope_interleaved|use_mrope|head_dim_override|interpolate_factor|full_attn_mod"
        r"|experts_per_token|(pad|eod|im_\w+)_id|org_vocab_size|pad_vocab_size_multiple|dense_list"
        r"|cla_share_factor|layer_switch"
    ),
}
HARMLESS = re.compile("|".join(_HARMLESS.values()))
"""Whole names of settings that change nothing of what is computed for a request, by reason."""

IN_TENSORS = re.compile(
    r"head_dim|.*_head_dim|num_(key_value|attention)_heads|.*_heads|n_inner|.*_width|.*(hidden|inter"
    r"mediate)_size|.*_rank|(mamba_)?expand|num_(local_)?experts|n_routed_experts|n_shared_experts"
    r"|.*conv_kernel\w*|conv_dim\w*|n_layers?|d_\w+|mlp_layer_types|moe_layers|linear_\w+|qk_head_dim"
)
"""They say which tensors there are, and of which shape: mlx-lm loads no others than it computes."""

_EPSILONS = ("_eps", "_epsilon")

ACTIVATIONS = frozenset(
    {
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "mlp_hidden_act",
        "mamba_hidden_act",
        "activation",
        "hidden_activation_function",
        "ffn_act_fn",
    }
)
_SAME_ACTIVATION = (
    ("silu", "swish"),
    # Exact or by tanh: the difference is below what bfloat16 can hold.
    ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "gelu_accurate"),
    ("relu2", "relu_squared", "relu^2"),
)
_COMPUTES = {
    "silu": r"silu|swiglu|SwiGLU|SwitchGLU",
    "gelu": r"gelu|GELU|geglu",
    "relu2": r"relu2|relu_squared",
    "relu": r"nn\.relu\b",
    "xielu": r"xielu|XieLU",
}
"""How an activation shows in a model's source, where transformers has no such architecture."""

COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    # Written in one published configuration where `sigmoid` is meant.
    "dots1": {"scoring_func": ("noaux_tc", "sigmoid")},
    # Read, and then the weights are taken apart as if it were set.
    "gpt_bigcode": {"multi_query": (True,)},
    # It looks whether there is an output layer.
    "gemma3_text": {"tie_word_embeddings": (True, False)},
    "gemma3": {"tie_word_embeddings": (True, False)},
    # It always has these tensors.
    "phimoe": {"attention_bias": (True,), "lm_head_bias": (True,)},
    # It has no rotary embedding at all.
    "kimi_linear": {"mla_use_nope": (True,)},
    # Read, and the groups are normalised as one.
    "mamba2": {"n_groups": (1,)},
    # Read, and the output layer is wanted nevertheless.
    "helium": {"tie_word_embeddings": (False,)},
}
"""The values with which mlx-lm's module computes the same, where its source does not say them."""


def not_computed(model: LanguageModel, has_output_layer: bool) -> Iterator[str]:
    """Settings that transformers' model reads, mlx-lm's does not, and that change the result."""
    for name, value in model.settings.items():
        if name == "tie_word_embeddings" and value is False and not has_output_layer:
            continue  # it is tied all the same
        is_listed = name in model.own(COMPUTED)
        if name in WINDOWS or ROTARY.fullmatch(name):
            continue
        if name in ACTIVATIONS:
            yield from _activation(model, name, value)
        elif name in model.mlx_lm.used and not is_listed:
            continue
        elif (is_listed or _changes_results(model, name)) and not _is_same(model, name, value):
            yield (
                f"{name} is {shown(value)} in config.json, and mlx-lm computes {model.name} as "
                f"with {shown(_computed(model, name)[0])}; a newer mlx-lm may do it"
            )

    chosen, is_normed = model.value("num_experts_per_tok"), model.value("norm_topk_prob")
    if chosen == 1 and is_normed is True and "top_k > 1 and" in model.mlx_lm.text:
        yield (
            "num_experts_per_tok is 1 in config.json, and mlx-lm weighs a single expert by its "
            f"score for {model.name}, not as norm_topk_prob says; a newer mlx-lm may do it"
        )


def _changes_results(model: LanguageModel, name: str) -> bool:
    """transformers' model reads it, or mlx-lm's class has it and its model does not read it."""
    known = model.transformers
    if HARMLESS.fullmatch(name) or IN_TENSORS.fullmatch(name):
        return False
    declared = model.mlx_lm.fields.get(name)
    if known is None or name not in known.fields:
        return declared is not None and declared.default is not UNKNOWN
    others = {alias for alias, real in known.aliases.items() if real == name}
    if known.aliases.get(name) in model.mlx_lm.used or others & model.mlx_lm.used:
        return False
    return name in known.used or name == "tie_word_embeddings"


def _computed(model: LanguageModel, name: str) -> tuple[Any, ...]:
    declared = model.mlx_lm.fields.get(name)
    if declared is not None and declared.default is not UNKNOWN:
        default = declared.default
    else:
        default = model.transformers.default(name) if model.transformers else None
    return model.own(COMPUTED).get(name, (default,))


def _is_same(model: LanguageModel, name: str, value: Any) -> bool:
    if name == "query_pre_attn_scalar" and value == model.value("head_dim"):
        return True
    if name == "indexer_types" and isinstance(value, list):
        return all(kind == "full" for kind in value)
    value, computed = as_number(value), _computed(model, name)
    return value in computed or (not value and not any(computed))


def _activation(model: LanguageModel, name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        return
    known = model.transformers
    if known is not None:
        if name not in known.fields:
            return
        computed = [_activation_name(each) for each in _computed(model, name)]
    else:
        source = model.mlx_lm.text
        computed = [act for act, pattern in _COMPUTES.items() if re.search(pattern, source)]
    if _activation_name(value) not in computed and any(computed):
        yield (
            f"{name} {shown(value)} in config.json is not what mlx-lm computes for {model.name} "
            f"({' or '.join(map(str, computed))}); a newer mlx-lm may do it"
        )


def _activation_name(value: Any) -> Any:
    return next((same[0] for same in _SAME_ACTIVATION if value in same), value)


def _epsilons(model: LanguageModel) -> list[Any]:
    """Of the normalisations that are computed: another name for the same is harmless."""
    return [model.value(name) for name in model.mlx_lm.used if name.endswith(_EPSILONS)]


def unread(model: LanguageModel) -> Iterator[str]:
    """One sentence about settings that nobody here knows."""
    known = model.transformers.fields if model.transformers else {}
    aliases = model.transformers.aliases if model.transformers else {}
    names = [
        name
        for name, value in model.settings.items()
        if not (name in known or name in aliases or name in model.mlx_lm.fields)
        and not isinstance(value, dict | str)
        and value not in (None, False, 0, 1, [])
        and not any(p.fullmatch(name) for p in (HARMLESS, ROTARY, IN_TENSORS))
        and not (name.endswith(_EPSILONS) and value in _epsilons(model))
        and name not in ACTIVATIONS | WINDOWS
    ]
    if names:
        shown = ", ".join(name[:40] for name in names[:5]) + (" and more" if names[5:] else "")
        yield (
            f"config.json sets {shown}, which mlx-lm does not read for {model.name}: if the model "
            "was trained with it, answers are not what they should be"
        )
