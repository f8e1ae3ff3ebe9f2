"""Which experts of a layer compute a token, where mlx-lm chooses or weighs them otherwise.

Each is done to one model, before its weights are in it: nothing of mlx-lm's is changed for others.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn

_BIASES = ("e_score_correction_bias", "expert_bias")
_NUM_GROUPS = ("n_group", "num_expert_group")


def keep_to_groups(config: Mapping[str, Any], weights: dict[str, mx.array]) -> None:
    """Make the biases that choose experts such that none of a group that is out can win.

    With experts in groups (DeepSeek V3 and those after it) only the best groups are in. To the
    others mlx-lm gives the score 0, which a negative score of the best groups loses against;
    transformers gives them -infinity. A score is a number between 0 and 1 and a bias, and only the
    order of scores counts: with the least bias at 0 none is negative, and the order is the same.

    Args:
        weights: by mlx-lm's names; those biases are replaced. The new ones are computed when
            the model is.
    """
    part = config.get("text_config")
    settings = part if isinstance(part, Mapping) else config
    if not any((settings.get(name) or 1) > 1 for name in _NUM_GROUPS):
        return
    for name, bias in weights.items():
        if name.endswith(_BIASES):
            exact = bias.astype(mx.float32)
            weights[name] = exact - mx.minimum(exact.min(), 0)


class ErnieExperts(nn.Module):
    """ERNIE's block of experts, chosen with a bias that mlx-lm's leaves out.

    Args:
        block: mlx-lm's.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate = block.gate
        self.gate_act = block.gate_act
        self.switch_mlp = block.switch_mlp
        self.shared_experts = block.shared_experts
        self.num_chosen = block.k
        self.correction_bias = mx.zeros((block.gate.weight.shape[0],))

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.gate_act(self.gate(x).astype(mx.float32))
        chosen = _best(scores + self.correction_bias, self.num_chosen)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights /= mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)
        y = _weighted(self.switch_mlp(x, chosen), weights)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class JambaExperts(nn.Module):
    """Jamba's block of experts. Their weights are shares of all experts' scores; mlx-lm's are
    shares of the chosen ones'.

    Args:
        block: mlx-lm's.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router = block.router
        self.switch_mlp = block.switch_mlp
        self.num_chosen = block.num_experts_per_tok

    def __call__(self, x: mx.array) -> mx.array:
        shares = mx.softmax(self.router(x).astype(mx.float32), axis=-1)
        chosen = _best(shares, self.num_chosen)
        return _weighted(self.switch_mlp(x, chosen), mx.take_along_axis(shares, chosen, axis=-1))


def _best(scores: mx.array, count: int) -> mx.array:
    """The experts with the highest scores, (…, experts) -> (…, count), in no order."""
    return mx.stop_gradient(mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count])


def _weighted(outputs: mx.array, weights: mx.array) -> mx.array:
    return (outputs * weights[..., None]).sum(axis=-2).astype(outputs.dtype)
