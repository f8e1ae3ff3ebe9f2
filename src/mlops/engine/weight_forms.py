"""A checkpoint's tensors by the names and shapes that mlx-lm's class for its architecture reads.

mlx-lm reads one form of each architecture, mostly the one that its makers released. transformers 5
saves some in another. To serve one more, write a function that brings it into mlx-lm's form, with
the reason, and enter it in `_FORMS`. Nothing is computed here: arrays are lazy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from mlops.checkpoints import Checkpoint

if TYPE_CHECKING:
    import mlx.core as mx

Weights: TypeAlias = "dict[str, mx.array]"

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class UnfitWeightsError(Exception):
    """mlx-lm does not compute with such weights: why, and what to do."""


def fit_weights(checkpoint: Checkpoint, model: Any, weights: Weights) -> Weights:
    """Bring the tensors of a checkpoint into the form that `model.sanitize` of mlx-lm reads.

    Args:
        model: mlx-lm's, without weights. A block of its experts is replaced where mlx-lm's computes
            something else.
        weights: by the names in the files.

    Raises:
        UnfitWeightsError: mlx-lm does not compute with such weights.
    """
    if checkpoint.is_headless:
        return {f"model.{name}": array for name, array in weights.items()}
    fit = _FORMS.get(checkpoint.architecture or "")
    return fit(model, weights) if fit else weights


def _gpt2(model: Any, weights: Weights) -> Weights:
    """mlx-lm knows the names of the first GPT-2 only; transformers writes a prefix."""
    return {name.removeprefix("transformer."): array for name, array in weights.items()}


def _gpt_oss(model: Any, weights: Weights) -> Weights:
    """mlx-lm takes gate and up, whose rows alternate, apart as MXFP4 has them: (experts, out, in).
    Weights that are not quantized are the other way round, (experts, in, out)."""
    fitted = {}
    for name, array in weights.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            fitted[f"{name}.weight"] = array.swapaxes(-1, -2)
        else:
            fitted[name] = array
    return fitted


def _qwen3_vl_moe(model: Any, weights: Weights) -> Weights:
    """mlx-lm reads (experts, in, out), as released; transformers 5 saves (experts, out, in)."""
    for gate_up in [name for name in weights if name.endswith(".experts.gate_up_proj")]:
        down = gate_up.replace("gate_up_proj", "down_proj")
        if down in weights and weights[gate_up].shape[-2] == 2 * weights[down].shape[-1]:
            for name in (gate_up, down):
                weights[name] = weights[name].swapaxes(-1, -2)
    return weights


def _stacked_experts(model: Any, weights: Weights) -> Weights:
    """mlx-lm reads all experts in one tensor, as released; transformers 5 saves each on its own."""
    import mlx.core as mx

    stacks: dict[str, dict[int, mx.array]] = {}
    for name in list(weights):
        if found := _EXPERT.fullmatch(name):
            stack = stacks.setdefault(f"{found[1]}.switch_mlp.{found[3]}.weight", {})
            stack[int(found[2])] = weights.pop(name)
    for name, stack in stacks.items():
        weights[name] = mx.stack([stack[number] for number in sorted(stack)])
    return weights


def _kimi_linear(model: Any, weights: Weights) -> Weights:
    """transformers 5 saves the layers without experts under the name of those with."""
    dense = re.compile(r"\.block_sparse_moe\.(gate_proj|up_proj|down_proj)\.")
    return {dense.sub(r".mlp.\1.", name): array for name, array in weights.items()}


def _llama4(model: Any, weights: Weights) -> Weights:
    """The text model alone has no prefix."""
    if "model.embed_tokens.weight" in weights:
        return {f"language_model.{name}": array for name, array in weights.items()}
    return weights


def _llama4_text(model: Any, weights: Weights) -> Weights:
    """Without experts. mlx-lm calls the output layer otherwise, and normalises queries and keys of
    layers without a rotary embedding too."""
    for layer in model.layers:
        layer.self_attn.use_qk_norm &= bool(layer.self_attn.use_rope)
    return _renamed(("lm_head.", "output."))(model, weights)


def _ernie4_5_moe(model: Any, weights: Weights) -> Weights:
    """mlx-lm leaves out the bias that chooses the experts."""
    from mlops.engine.routing import ErnieExperts

    fitted = _renamed(("moe_statics.e_score_correction_bias", "correction_bias"))(model, weights)
    for number, layer in enumerate(model.layers):
        if not hasattr(layer.mlp, "switch_mlp"):
            continue
        layer.mlp = ErnieExperts(layer.mlp)
        bias = f"model.layers.{number}.mlp.correction_bias"
        if bias not in fitted:
            raise UnfitWeightsError(
                "the bias that chooses the experts (e_score_correction_bias) is missing, as "
                "mlx-lm leaves it out when it converts a model; give the model before it was "
                "converted"
            )
        fitted[bias] = fitted[bias].reshape(-1)
    return fitted


def _jamba(model: Any, weights: Weights) -> Weights:
    """mlx-lm weighs the experts otherwise."""
    from mlops.engine.routing import JambaExperts

    for layer in model.layers:
        if hasattr(layer.feed_forward, "switch_mlp"):
            layer.feed_forward = JambaExperts(layer.feed_forward)
    return weights


def _minicpm3(model: Any, weights: Weights) -> Weights:
    """mlx-lm leaves out a factor of the logits when the output layer is the embedding: here it is
    in the norm before it."""
    name, args = "model.norm.weight", model.args
    if args.tie_word_embeddings and name in weights:
        weights[name] *= args.dim_model_base / args.hidden_size
    return weights


def _renamed(*pairs: tuple[str, str]) -> Callable[[Any, Weights], Weights]:
    """Parts of names, by what mlx-lm calls them."""

    def fit(model: Any, weights: Weights) -> Weights:
        for theirs, ours in pairs:
            weights = {name.replace(theirs, ours): array for name, array in weights.items()}
        return weights

    return fit


def _longcat_flash(model: Any, weights: Weights) -> Weights:
    """Experts that pass on what they get have weights in transformers, and are not computed."""
    return {
        name: array
        for name, array in weights.items()
        if not (found := _EXPERT.fullmatch(name)) or int(found[2]) < model.args.n_routed_experts
    }


def _olmo_hybrid(model: Any, weights: Weights) -> Weights:
    """transformers 5 has other names for two norms, and one convolution of queries, keys and
    values, which it saves in three equal parts, whatever their widths are."""
    import mlx.core as mx

    weights = _renamed(
        (".attention_layer_norm.", ".input_layernorm."),
        (".feedforward_layer_norm.", ".post_attention_layernorm."),
    )(model, weights)
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}.linear_attn"
        names = [f"{prefix}.{part}_conv1d.weight" for part in "qkv"]
        if names[0] not in weights or len(weights[names[0]]) == layer.linear_attn.key_dim:
            continue
        joined = mx.concatenate([weights[name] for name in names])
        ends = [layer.linear_attn.key_dim, 2 * layer.linear_attn.key_dim]
        weights |= zip(names, mx.split(joined, ends), strict=True)
    return weights


def _bitnet(model: Any, weights: Weights) -> Weights:
    """mlx-lm has a kernel for packed weights, and nothing for others."""
    if not any(name.endswith(".weight_scale") for name in weights):
        raise UnfitWeightsError(
            "mlx-lm only computes packed weights of 1.58 bits; give the packed form of the model"
        )
    return weights


_FORMS: dict[str, Callable[[Any, Weights], Weights]] = {
    "bitnet": _bitnet,
    "ernie4_5_moe": _ernie4_5_moe,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "jamba": _jamba,
    "kimi_linear": _kimi_linear,
    "llama4": _llama4,
    "llama4_text": _llama4_text,
    "longcat_flash": _longcat_flash,
    "minicpm3": _minicpm3,
    # mlx-lm has the names of nanochat's own code.
    "nanochat": _renamed(
        ("model.embed_tokens.", "transformer.wte."),
        ("model.layers.", "transformer.h."),
        (".self_attn.q_proj.", ".attn.c_q."),
        (".self_attn.k_proj.", ".attn.c_k."),
        (".self_attn.v_proj.", ".attn.c_v."),
        (".self_attn.o_proj.", ".attn.c_proj."),
        (".mlp.fc1.", ".mlp.c_fc."),
        (".mlp.fc2.", ".mlp.c_proj."),
    ),
    "olmo_hybrid": _olmo_hybrid,
    "qwen3_5_moe": _stacked_experts,
    "qwen3_vl_moe": _qwen3_vl_moe,
}
"""By architecture."""
