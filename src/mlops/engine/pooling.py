"""From token ids to vectors: the states of a model's last layer, pooled as its checkpoint says.

Attention is causal, so what stands right of a text changes nothing in it: texts of different
lengths are padded on the right and share a forward pass without a mask. A text that is too long
for one pass is computed in pieces, with caches.
"""

# mypy: disable-error-code="misc, no-any-return, no-untyped-call"
# mlx.nn has no types.

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlops.checkpoints import Checkpoint, Pooling, PoolingMode
from mlops.engine.batching import LONG, rounding_tolerance
from mlops.engine.kv import Caches, begin_computing
from mlops.engine.prefill import new_caches

if TYPE_CHECKING:
    from mlx import nn

logger = logging.getLogger(__name__)

TRIAL_INPUTS = ((1, 2), LONG[:5], LONG[5:45])


class Pooler:
    """Computes vectors with one model; in the owner thread.

    Attributes:
        size: numbers of a vector; 0 before the first was computed.

    Args:
        model: mlx-lm's.
        pooling: without a `problem`.

    Raises:
        AttributeError: the model has no layers apart from its output layer.
    """

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        self.size = 0
        self.pooling = pooling
        self.model = model
        self._body = getattr(model, "language_model", model).model

    @property
    def dtype(self) -> mx.Dtype:
        """Of the states; nothing is computed to know it."""
        return self._body(mx.array([[1]])).dtype

    def pool(self, inputs: Sequence[Sequence[int]]) -> mx.array:
        """Begin to compute the vectors of several texts in one forward pass.

        Args:
            inputs: token ids of each text, at least one.

        Returns:
            float32 (texts, size), neither cut nor normalized.
        """
        lengths = mx.array([len(one) for one in inputs])
        longest = max(map(len, inputs))
        padded = mx.array([[*one, *([0] * (longest - len(one)))] for one in inputs])
        states = self._body(padded)
        mode = self.pooling.mode
        if mode is PoolingMode.FIRST:
            vectors = states[:, 0]
        elif mode is PoolingMode.LAST:
            vectors = states[mx.arange(len(inputs)), lengths - 1]
        else:
            is_text = mx.arange(longest)[None] < lengths[:, None]
            # Not a product with 0: what stands in the padding may be infinite.
            own = mx.where(is_text[..., None], states.astype(mx.float32), 0.0)
            vectors = own.sum(axis=1) / lengths[:, None]
        vectors = vectors.astype(mx.float32)
        mx.async_eval(vectors)
        return vectors

    def begin(self) -> LongInput:
        """A text that is computed in pieces."""
        return LongInput(self._body, self.pooling.mode, new_caches(self.model))


class LongInput:
    """One text, computed piece by piece."""

    def __init__(self, body: Any, mode: PoolingMode, caches: Caches) -> None:
        self.num_done = 0
        self._body = body
        self._mode = mode
        self._caches = caches
        self._pooled: mx.array | None = None

    def add(self, tokens: Sequence[int]) -> mx.array:
        """Begin to compute the next tokens.

        Returns:
            float32 (1, size): the vector of the text so far.
        """
        states = self._body(mx.array([list(tokens)]), cache=self._caches)
        self.num_done += len(tokens)
        if self._mode is PoolingMode.LAST:
            self._pooled = states[:, -1].astype(mx.float32)
        elif self._mode is PoolingMode.MEAN:
            summed = states.astype(mx.float32).sum(axis=1)
            self._pooled = summed if self._pooled is None else self._pooled + summed
        elif self._pooled is None:
            self._pooled = states[:, 0].astype(mx.float32)
        begin_computing([self._caches])
        vector = self._pooled
        if self._mode is PoolingMode.MEAN:
            vector = vector / self.num_done
        mx.async_eval(vector)
        return vector


def to_host(vectors: mx.array) -> NDArray[np.float32]:
    """Wait for vectors and copy them: arrays of MLX belong to the owner thread."""
    return np.array(vectors, dtype=np.float32)


def try_pooling(checkpoint: Checkpoint, model: nn.Module) -> tuple[Pooler | None, str]:
    """What computes a model's embeddings; or None, and why there is nothing that does.

    Tried, not assumed: two texts together must give what each gives alone, and in pieces.
    """
    if checkpoint.pooling is None:
        return None, (
            "this model generates text and gives no embeddings: its folder has no modules.json, "
            "in which sentence-transformers says how to pool"
        )
    problem = checkpoint.pooling.problem
    pooler = None
    if not problem:
        try:
            pooler = Pooler(model, checkpoint.pooling)
            problem = _find_problem(pooler)
        except Exception as exc:  # whatever fails here would fail the requests
            problem = f"to compute two texts together fails: {exc}"
    if not problem:
        return pooler, ""
    logger.warning("%s gives no embeddings: %s", checkpoint.path, problem)
    return None, f"this model gives no embeddings: {problem}"


def _find_problem(pooler: Pooler) -> str:
    alone = [to_host(pooler.pool([one]))[0] for one in TRIAL_INPUTS]
    pooler.size = int(alone[0].shape[0])
    if not all(np.isfinite(one).all() for one in alone):
        return "its vectors are not finite"
    together = to_host(pooler.pool(TRIAL_INPUTS))
    long, pieces = pooler.begin(), TRIAL_INPUTS[-1]
    long.add(pieces[:25])
    in_pieces = to_host(long.add(pieces[25:]))
    tolerance = rounding_tolerance(pooler.dtype, len(new_caches(pooler.model)))
    for one, other in [*zip(alone, together, strict=True), (alone[-1], in_pieces[0])]:
        if one.shape != other.shape or one.ndim != 1:
            return f"its layers give states of the shape {one.shape}"
        if not np.abs(one - other).max() <= tolerance * np.abs(one).max():  # NaN is a problem too
            return "texts computed together or in pieces have other vectors than alone"
    return ""
