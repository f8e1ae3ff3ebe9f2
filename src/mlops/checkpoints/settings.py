"""Does mlx-lm compute what the settings in `config.json` say? Everything but rotary embeddings.

    the settings -> are their values possible? -> what mlx-lm must be told -> what it cannot do

Nothing is ignored in silence. A setting that transformers' model reads and mlx-lm's does not is
told by a name that mlx-lm knows; or it has the value with which both compute the same; or the
context is held to where they do; or the checkpoint is refused. What each library reads comes from
its sources (`setting_sources`); the tables here hold what they do not say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops.checkpoints import architectures, setting_sources
from mlops.checkpoints.checkpoint import CONTEXT_TOKENS
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.setting_sources import UNKNOWN, Settings
from mlops.checkpoints.setting_values import impossible_values
from mlops.counts import count

HARMLESS = re.compile(
    r"max_context_tokens|_.*"
    # training
    r"|.*(dropout|pdrop|_drop).*|.*initializer.*|.*init_(std|method|scale|scheme|floor).*"
    r"|.*(aux_loss|_loss|z_loss|jitter|regulari).*|.*_init|output_\w+|return_dict\w*"
    r"|rescale_prenorm_residual|time_step_(min|max|floor|scale|init_scheme)|gradient_checkpointing"
    r"|linear_(a_log|dt)_(min|max)|w_init_variance_scale|final_w_init_variance_scale|seq_aux"
    r"|use_cache|use_return_dict|is_encoder_decoder|cross_attention_hidden_size|chunk_size_feed.*"
    # the tokenizer's, labels, other parts of the model
    r"|(.*_)?token_(id|index)|.*token_ids|prefix|suffix|vocab_size|tokenizer_class"
    r"|architectures|model_type|auto_map|.*dtype|transformers.*|.*version|name_or_path|task\w*"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|classifier\w*|summary_\w+"
    r"|(text|vision|audio|video|speech|image|mm|projector|multimodal)_\w+|quantization.*|unsloth.*"
    # precision and speed
    r"|residual_in_fp32|\w*softmax_in_fp32|reorder_and_upcast_attn|fp32_\w+|use_bfloat16"
    r"|use_(mamba_kernels|mambapy|associative_scan|flash_attn\w*|fused\w*|kernels?)"
    r"|attn_implementation"
    r"|(mamba_)?chunk_size|block_size|num_logits_to_keep|pretraining_tp|ep_size|cache_implementation"
    # defaults for sampling
    r"|max_length|min_length|do_sample|temperature|top_[kp]|num_beams\w*|repetition_penalty|typical_p"
    r"|length_penalty|no_repeat_ngram_size|bad_words_ids|num_return_sequences|diversity_penalty"
    r"|encoder_no_repeat_ngram_size|early_stopping|begin_suppress_tokens|suppress_tokens"
    r"|remove_invalid_values|exponential_decay_length_penalty|pruned_heads|max_new_tokens|tf_legacy.*"
    r"|torchscript|mtp_\w+|num_mtp_layers|num_nextn_predict_layers|keys_to_ignore.*|rope_interleaved"
    r"|is_llama_config|use_mrope|head_dim_override|seq_length|initial_context_length|max_seq_len\w*"
    r"|max_sequence_length|model_max_length|max_window_layers|interpolate_factor|full_attn_mod"
    r"|experts_per_token|n_special|n_ctx|n_positions|predict_special_tokens|sep_token|gguf_file"
    # beside others that say the same, in released models
    r"|(pad|eod|im_\w+)_id|org_vocab_size|pad_vocab_size_multiple|dense_list|cla_share_factor"
    r"|layer_switch"
)
"""Whole names of settings that change nothing of what is computed for a request: training, the
tokenizer, labels, precision and speed, the defaults of other libraries for sampling, other parts
than the language model."""

ROTARY = re.compile(
    r"rope.*|.*rope_.*|rotary.*|partial_rotary\w*|original_max_position_embeddings|no_rope_layer\w*"
    r"|max_position_embeddings|swa_rope\w*"
)
"""Translated in another place, with the context."""

IN_TENSORS = re.compile(
    r"head_dim|.*_head_dim|num_(key_value|attention)_heads|.*_heads|n_inner|.*_width|.*(hidden|inter"
    r"mediate)_size|.*_rank|(mamba_)?expand|num_(local_)?experts|n_routed_experts|n_shared_experts"
    r"|.*conv_kernel\w*|conv_dim\w*|n_layers?|d_\w+|mlp_layer_types|moe_layers|linear_\w+|qk_head_dim"
)
"""They say which tensors there are, and of which shape: mlx-lm loads no others than it computes."""

EPSILONS = ("_eps", "_epsilon")

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

_WINDOWS = frozenset(
    {
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "sliding_window_pattern",
        "attention_chunk_size",
    }
)

COMPUTED: dict[tuple[str, str], tuple[Any, ...]] = {
    # Written in one published configuration where `sigmoid` is meant.
    ("dots1", "scoring_func"): ("noaux_tc", "sigmoid"),
    # Read, and then the weights are taken apart as if it were set.
    ("gpt_bigcode", "multi_query"): (True,),
    # It looks whether there is an output layer.
    ("gemma3_text", "tie_word_embeddings"): (True, False),
    ("gemma3", "tie_word_embeddings"): (True, False),
    # It always has these tensors.
    ("phimoe", "attention_bias"): (True,),
    ("phimoe", "lm_head_bias"): (True,),
    # Read, and the groups are normalised as one.
    ("mamba2", "n_groups"): (1,),
    # Read, and the output layer is wanted nevertheless.
    ("helium", "tie_word_embeddings"): (False,),
}
"""The values with which mlx-lm's module computes the same, where its source does not say them."""


def _sparse_layers(settings: Mapping[str, Any]) -> list[bool] | None:
    kinds = settings.get("mlp_layer_types")
    return [kind == "sparse" for kind in kinds] if isinstance(kinds, list) else None


def _linear_attention(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    kinds = settings.get("layer_types")
    if not isinstance(kinds, list):
        return None
    linear = [number for number, kind in enumerate(kinds, 1) if kind == "linear_attention"]
    return {
        "head_dim": settings.get("linear_head_dim"),
        "num_heads": settings.get("linear_num_heads"),
        "short_conv_kernel_size": settings.get("linear_conv_kernel_dim"),
        "kda_layers": linear,
        "full_attn_layers": [n for n in range(1, len(kinds) + 1) if n not in linear],
    }


DERIVED: dict[tuple[str, str], Callable[[Mapping[str, Any]], Any]] = {
    ("gpt2", "n_ctx"): lambda it: it.get("n_positions"),
    ("gpt_bigcode", "n_inner"): lambda it: 4 * it.get("n_embd", 0),
    ("lfm2", "block_dim"): lambda it: it.get("hidden_size"),
    # Read by no line of the model.
    ("mamba2", "intermediate_size"): lambda it: it.get("hidden_size"),
    ("minimax", "shared_intermediate_size"): lambda it: 0,
    ("longcat_flash", "attention_method"): lambda it: "MLA",
    ("longcat_flash", "zero_expert_type"): lambda it: "identity",
    ("longcat_flash", "mla_scale_q_lora"): lambda it: True,
    ("longcat_flash", "mla_scale_kv_lora"): lambda it: True,
    ("apertus", "post_norm"): lambda it: False,
    ("apertus", "qk_norm"): lambda it: True,
    # Of layers without experts, which it does not have.
    ("solar_open", "intermediate_size"): lambda it: it.get("moe_intermediate_size"),
    # What transformers' model does for all.
    ("solar_open", "first_k_dense_replace"): lambda it: 0,
    ("glm_moe_dsa", "moe_layer_freq"): lambda it: 1,
    ("glm_moe_dsa", "topk_method"): lambda it: "noaux_tc",
    ("glm_moe_dsa", "scoring_func"): lambda it: "sigmoid",
    ("exaone_moe", "is_moe_layer"): _sparse_layers,
    ("kimi_linear", "linear_attn_config"): _linear_attention,
}
"""Settings that mlx-lm's module needs and transformers writes by another name, or not at all."""


OVERRULED: dict[tuple[str, str], Callable[[Mapping[str, Any]], Any]] = {
    ("falcon_h1", "attention_in_multiplier"): lambda it: (
        it.get("attention_in_multiplier", 1.0) * it.get("key_multiplier", 1.0) ** 0.5
    ),
    ("falcon_h1", "attention_out_multiplier"): lambda it: (
        it.get("attention_out_multiplier", 1.0) * it.get("attention_in_multiplier", 1.0)
    ),
}
"""Settings that mlx-lm applies elsewhere than transformers. Of falcon_h1 it scales queries and keys
by `attention_in_multiplier`, values not, and leaves `key_multiplier` out."""


@dataclass(frozen=True)
class Honoured:
    """What comes of the settings.

    Attributes:
        model_config: what mlx-lm is given in place of what `config.json` says, and under
            `CONTEXT_TOKENS` where its model begins to compute something else.
        warnings: what its user should know, a sentence each.
    """

    model_config: Mapping[str, Any]
    warnings: tuple[str, ...]


def honour_settings(path: Path, config: Mapping[str, Any], tensor_names: Iterable[str]) -> Honoured:
    """Hold the settings of a language model against what mlx-lm computes.

    Args:
        config: `config.json`, with what is already known to be given in its place.
        tensor_names: as they are in the weight files.

    Raises:
        PackagingError: a setting has a value that is not possible, or that mlx-lm does not compute.
    """
    language_model = LanguageModel.of(config)
    for problem in impossible_values(language_model.settings, _types(language_model)):
        raise _refuse(path, f"{problem}; use the config.json that was saved with the weights")
    has_output_layer = any(map(_is_output_layer, tensor_names))
    told = dict(_told(language_model, has_output_layer))
    for problem in _missing(language_model, told):
        raise _refuse(path, problem)
    attention = _windows(language_model)
    for problem in (attention.problem, *_not_computed(language_model, has_output_layer)):
        if problem:
            raise _refuse(path, problem)
    model_config = language_model.as_model_config({**told, **attention.told})
    limits = (attention.max_context_tokens, config.get(CONTEXT_TOKENS))
    if given := [limit for limit in limits if isinstance(limit, int)]:
        model_config[CONTEXT_TOKENS] = min(given)
    return Honoured(model_config, (*attention.warnings, *_unread(language_model)))


def is_said_tied(config: Mapping[str, Any]) -> bool:
    """Whether its output layer is its embedding, by `config.json` or what is meant without a word
    there."""
    return _is_tied(LanguageModel.of(config), has_output_layer=True)


def _types(model: LanguageModel) -> dict[str, frozenset[str]]:
    """What the settings that mlx-lm reads may be: its annotations are narrower than its code."""
    known = model.transformers.fields if model.transformers else {}
    return {
        name: model.mlx_lm.fields[name].types | (known[name].types if name in known else set())
        for name in model.mlx_lm.read
        if not ROTARY.fullmatch(name)
    }


def _refuse(path: Path, problem: str) -> Exception:
    return refusal(f"{path}: {problem}", path, problem=problem)


@dataclass(frozen=True)
class LanguageModel:
    """The settings of the part that makes text, and what both libraries know of them.

    Attributes:
        name: the `model_type`, for sentences.
        settings: `config.json`, or `text_config` in it where mlx-lm reads that.
        is_nested: the latter.
        transformers: None where it does not know the architecture.
    """

    name: str
    module: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    is_nested: bool
    mlx_lm: Settings
    transformers: Settings | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LanguageModel:
        module = architectures.module_name(config)
        mlx_lm = setting_sources.of_mlx_lm(module)
        name, nested = config["model_type"], config.get("text_config")
        is_nested = isinstance(nested, dict) and "text_config" in mlx_lm.fields
        settings = nested if isinstance(nested, dict) and is_nested else config
        types = (settings.get("model_type"), f"{name}_text") if is_nested else (name,)
        known = (setting_sources.of_transformers(str(type_)) for type_ in types)
        transformers = next((found for found in known if found), None)
        return cls(name, module, config, settings, is_nested, mlx_lm, transformers)

    def as_model_config(self, told: Mapping[str, Any]) -> dict[str, Any]:
        if self.is_nested and told:
            return {"text_config": {**self.settings, **told}}
        return dict(told)

    def value(self, name: str) -> Any:
        """Of a setting, or what transformers takes when it is left out."""
        if name in self.settings:
            return self.settings[name]
        return self.transformers.default(name) if self.transformers else None

    @property
    def layer_types(self) -> list[Any] | None:
        found = self.settings.get("layer_types")
        return found if isinstance(found, list) else None

    @property
    def num_layers(self) -> int:
        found = self.value("num_hidden_layers")
        return found if isinstance(found, int) else 0


def _is_output_layer(name: str) -> bool:
    return name.endswith(("lm_head.weight", "embed_out.weight")) or name == "output.weight"


def _told(model: LanguageModel, has_output_layer: bool) -> Iterator[tuple[str, Any]]:
    """What is left out of the file or written in another way, by the names that mlx-lm reads."""
    for name, value in model.settings.items():
        if name in model.mlx_lm.read and (number := _as_number(value)) != value:
            yield name, number
    for (module, name), derive in OVERRULED.items():
        if module == model.module and (value := derive(model.settings)) != model.value(name):
            yield name, value
    for name in sorted(model.mlx_lm.fields.keys() - {"model_type", "text_config", *_WINDOWS}):
        if ROTARY.fullmatch(name) or model.settings.get(name) is not None:
            continue
        field = model.mlx_lm.fields[name]
        value = _left_out(model, name, has_output_layer)
        if value is not None and (field.default is UNKNOWN or value != field.default):
            yield name, list(value) if isinstance(value, tuple) else value


def _as_number(value: Any) -> Any:
    """transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict) and list(value) == ["__float__"]:
        return float(value["__float__"]) if value["__float__"] in _FLOATS else value
    return [_as_number(each) for each in value] if isinstance(value, list) else value


_FLOATS = ("Infinity", "-Infinity")


def _left_out(model: LanguageModel, name: str, has_output_layer: bool) -> Any:
    """The value of a setting that the file does not have, or has as null."""
    if name == "tie_word_embeddings":
        return _is_tied(model, has_output_layer)
    known = _as_transformers_has_it(model, name)
    return _derived(model, name) if known is None else known


def _is_tied(model: LanguageModel, has_output_layer: bool) -> bool:
    around = model.config.get("tie_word_embeddings")
    if isinstance(around, bool):
        return around
    known = model.transformers
    return bool(known and known.default("tie_word_embeddings")) or not has_output_layer


def _as_transformers_has_it(model: LanguageModel, name: str) -> Any:
    """By another name, or left out for being transformers' default."""
    known, settings = model.transformers, model.settings
    if known is None:
        return None
    for alias, real in known.aliases.items():
        found = settings.get(real, settings.get(alias))
        if name in (alias, real) and found is not None:
            return found
    return None if name in settings else known.default(name)


def _derived(model: LanguageModel, name: str) -> Any:
    """What follows from other settings."""
    settings, default = model.settings, model.mlx_lm.fields[name].default
    heads, hidden = settings.get("num_attention_heads"), settings.get("hidden_size")
    if derive := DERIVED.get((model.module, name)):
        return derive(settings)
    if name == "num_key_value_heads" and (default is not None or name in settings):
        return heads
    if name == "head_dim" and (default is not None or name in settings):
        return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None
    if name.endswith("_bias") and default is UNKNOWN and model.transformers:
        return False if name not in model.transformers.fields else None
    layers = settings.get("mlp_layer_types")
    if name == "first_k_dense_replace" and isinstance(layers, list):
        return next((i for i, kind in enumerate(layers) if kind != "dense"), len(layers))
    return None


def _missing(model: LanguageModel, told: Mapping[str, Any]) -> Iterator[str]:
    if model.is_nested:
        return
    for name, field in model.mlx_lm.fields.items():
        is_left_out = field.is_required and name not in model.settings and name not in told
        if is_left_out and not ROTARY.fullmatch(name) and name not in _WINDOWS:
            yield (
                f"config.json does not set {name}, which mlx-lm needs for {model.name}; "
                "use the config.json that was saved with the weights"
            )


def _not_computed(model: LanguageModel, has_output_layer: bool) -> Iterator[str]:
    """Settings that transformers' model reads, mlx-lm's does not, and that change the result."""
    for name, value in model.settings.items():
        if name == "tie_word_embeddings" and value is False and not has_output_layer:
            continue  # it is tied all the same
        is_listed = (model.module, name) in COMPUTED
        if name in _WINDOWS or ROTARY.fullmatch(name):
            continue
        if name in ACTIVATIONS:
            yield from _activation(model, name, value)
        elif name in model.mlx_lm.read and not is_listed:
            continue
        elif (is_listed or _changes_results(model, name)) and not _is_same(model, name, value):
            yield (
                f"{name} is {_shown(value)} in config.json, and mlx-lm computes {model.name} as "
                f"with {_shown(_computed(model, name)[0])}; a newer mlx-lm may do it"
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
    if known.aliases.get(name) in model.mlx_lm.read or others & model.mlx_lm.read:
        return False
    return name in known.read or name == "tie_word_embeddings"


def _computed(model: LanguageModel, name: str) -> tuple[Any, ...]:
    declared = model.mlx_lm.fields.get(name)
    if declared is not None and declared.default is not UNKNOWN:
        default = declared.default
    else:
        default = model.transformers.default(name) if model.transformers else None
    return COMPUTED.get((model.module, name), (default,))


def _is_same(model: LanguageModel, name: str, value: Any) -> bool:
    if name == "query_pre_attn_scalar" and value == model.value("head_dim"):
        return True
    if name == "indexer_types" and isinstance(value, list):
        return all(kind == "full" for kind in value)
    value, computed = _as_number(value), _computed(model, name)
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
        source = model.mlx_lm.source
        computed = [act for act, pattern in _COMPUTES.items() if re.search(pattern, source)]
    if _activation_name(value) not in computed and any(computed):
        yield (
            f"{name} {_shown(value)} in config.json is not what mlx-lm computes for {model.name} "
            f"({' or '.join(map(str, computed))}); a newer mlx-lm may do it"
        )


def _activation_name(value: Any) -> Any:
    return next((same[0] for same in _SAME_ACTIVATION if value in same), value)


def _shown(value: Any) -> str:
    text = "left out" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Attention:
    """What comes of settings that limit how far attention reaches back."""

    told: Mapping[str, Any]
    max_context_tokens: int | None = None
    warnings: tuple[str, ...] = ()
    problem: str = ""


def _windows(model: LanguageModel) -> Attention:
    types = model.layer_types
    if types is not None and len(types) != model.num_layers:
        return Attention(
            {},
            problem=f"layer_types in config.json names {count(len(types), 'layer')}, "
            f"num_hidden_layers says {model.num_layers}",
        )
    chunk = model.value("attention_chunk_size")
    if (
        "attention_chunk_size" in model.mlx_lm.read
        or types == ["full_attention"] * model.num_layers
    ):
        chunk = None
    if isinstance(chunk, int) and model.transformers:
        return _capped(model, chunk, "attention_chunk_size")
    window = _window(model)
    if "layer_types" in model.mlx_lm.read:
        return _by_layer_types(model, window)
    if "sliding_window_pattern" in model.mlx_lm.read:
        return _by_pattern(model, types)
    if window is None or ("sliding_window" in model.mlx_lm.read and types is None):
        return Attention({})
    return _capped(model, window, "sliding_window")


def _window(model: LanguageModel) -> int | None:
    """Tokens that a layer with a sliding window sees; None when no layer has one."""
    known, types = model.transformers, model.layer_types
    window = model.value("sliding_window")
    if (
        not isinstance(window, int)
        or window < 1
        or (known and "sliding_window" not in known.fields)
    ):
        return None
    if model.value("use_sliding_window") is False:
        return None
    if types is not None:
        return window if "sliding_attention" in types else None
    full = model.value("max_window_layers")
    if isinstance(full, int) and full >= model.num_layers and model.name != "qwen2_moe":
        return None
    return window


def _by_layer_types(model: LanguageModel, window: int | None) -> Attention:
    """mlx-lm's class has windows, where `layer_types` says so."""
    types = model.layer_types
    if model.module == "exaone_moe" and window is None and model.value("sliding_window"):
        return Attention({}, problem=_no_such_order(model))  # it would rotate in all layers
    if (
        model.module in _SAME_WITHOUT_WINDOW
        and window is not None
        and (types is None or "full_attention" not in types)
    ):
        # Without a layer that sees all, mlx-lm's class cannot be made.
        told = {} if types is None else {"layer_types": ["full_attention"] * len(types)}
        return _capped(model, window, "sliding_window", told)
    looked_for = re.findall(
        r"layer_types\.index\(\"((?:full|sliding)_attention)\"\)", model.mlx_lm.source
    )
    if types is not None and not set(looked_for) <= set(types):
        return Attention({}, problem=_no_such_order(model))
    return Attention({})


_LOOKED_FOR = re.compile(r"layer_types\.index\(\"((?:full|sliding)_attention)\"\)")
_SAME_WITHOUT_WINDOW = frozenset({"llama", "ministral3"})
"""Layers with a window differ in nothing else, and are left without one where no type is given."""


def _by_pattern(model: LanguageModel, types: list[Any] | None) -> Attention:
    """mlx-lm's class takes one number, or letters: each so many layers, one without a window."""
    if types is None:
        return Attention({})
    is_text = "str" in model.mlx_lm.fields["sliding_window_pattern"].types
    if is_text:
        letters = "".join("L" if kind == "sliding_attention" else "G" for kind in types)
        if set(letters) == {"L", "G"}:
            return Attention({"sliding_window_pattern": letters})
        if model.value("sliding_window") is None:
            return Attention({"sliding_window_pattern": None})
    for pattern in range(1, len(types) + 1):
        made = [(i + 1) % pattern != 0 for i in range(len(types))]
        if not is_text and made == [kind == "sliding_attention" for kind in types]:
            return Attention({"sliding_window_pattern": pattern})
    return Attention({}, problem=_no_such_order(model))


def _no_such_order(model: LanguageModel) -> str:
    return (
        "the order of layers with and without a sliding window (layer_types in config.json) is one "
        f"that mlx-lm does not compute for {model.name}; a newer mlx-lm may do it"
    )


def _capped(
    model: LanguageModel, window: int, name: str, told: Mapping[str, Any] | None = None
) -> Attention:
    context = model.settings.get("max_position_embeddings")
    if isinstance(context, int) and context <= window:
        return Attention(told or {})
    warning = (
        f"mlx-lm has no sliding window for {model.name}, and {name} is {window} in config.json: "
        f"prompt and answer together are held to {window} tokens, as far as both compute the same"
    )
    return Attention(told or {}, window, (warning,))


def _epsilons(model: LanguageModel) -> list[Any]:
    """Of the normalisations that are computed: other names for the same are harmless."""
    names = (name for name in model.mlx_lm.read if name.endswith(EPSILONS))
    return [model.value(name) for name in names]


def _unread(model: LanguageModel) -> Iterator[str]:
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
        and not (name.endswith(EPSILONS) and value in _epsilons(model))
        and name not in ACTIVATIONS | _WINDOWS
    ]
    if names:
        shown = ", ".join(name[:40] for name in names[:5]) + (" and more" if names[5:] else "")
        yield (
            f"config.json sets {shown}, which mlx-lm does not read for {model.name}: if the model "
            "was trained with it, answers are not what they should be"
        )
