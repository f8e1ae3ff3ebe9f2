"""What a model gives in an engine that batches, against what it gives for a text in one piece.

It knows nothing of the trial: many lengths, rows that come and go, prompts in chunks, answers that
go on from the prefix cache.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import every_architecture
from engines import TIMEOUT_S, running
from mlops import engine
from mlops.engine import GenerationRequest, GenerationResult, LoadedModel
from mlops.engine.batching import Trial, try_out
from mlops.errors import MLOpsError

TOLERANCE = 1e-3
"""Of a log-probability; what is right differs by some 1e-6."""


def verdict_and_truth(
    loaded: LoadedModel, architecture: str, **settings: Any
) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
    """Whether its rows can be decoded together, and prompts computed together: as the trial says,
    and as it is.

    Args:
        loaded: any model; its tokenizer is used.
        settings: of the architecture, other than the usual ones.
    """

    def make() -> tuple[Any, Trial]:
        from mlops.engine.grouped_masks import fit_masks

        model = every_architecture.build(architecture, **settings)
        fit_masks(model, architecture)
        return model, try_out(model)

    model, trial = engine.run_in_owner(make)
    assert is_right(loaded, model, trial, False, False), "a row alone is not what the text is"
    decoded = is_right(loaded, model, trial, True, False)
    prefilled = is_right(loaded, model, trial, True, True)
    return (trial.can_batch, trial.can_prefill_together), (decoded, prefilled)


def is_right(
    loaded: LoadedModel, model: Any, trial: Trial, can_batch: bool, can_prefill_together: bool
) -> bool:
    """Whether an engine that does as it is told gives the log-probabilities of one piece."""
    told = dataclasses.replace(
        trial, can_batch=can_batch, can_prefill_together=can_prefill_together
    )
    requests = _requests()
    try:
        results = _answers(dataclasses.replace(loaded, model=model, trial=told), requests)
    except MLOpsError:
        return False
    return all(
        _error(model, request, result) <= TOLERANCE
        for request, result in zip(requests, results, strict=True)
    )


def _requests() -> list[GenerationRequest]:
    source = random.Random(2)  # noqa: S311
    lengths = (1, 60, 2, 17, 33, 5, 21, 90, 3, 9)
    prompts = [tuple(source.choices(range(1, 60), k=length)) for length in lengths]
    prompts += [prompts[4] + prompts[0], prompts[4] + prompts[5], prompts[1][:30] + prompts[2]]
    return [
        GenerationRequest(prompt, max_tokens=source.randint(2, 14), logprobs=3)
        for prompt in prompts
    ]


def _answers(loaded: LoadedModel, requests: list[GenerationRequest]) -> list[GenerationResult]:
    with running(loaded, max_rows=4, prefill_tokens=40, prefix_memory_bytes=2**24) as one:
        generations = []
        for number, request in enumerate(requests):
            generations.append(one.submit(request))
            if number % 3 == 2:  # the next ones come when some rows have gone
                generations[-3].result(TIMEOUT_S)
        return [generation.result(TIMEOUT_S) for generation in generations]


def _error(model: Any, request: GenerationRequest, result: GenerationResult) -> float:
    """The most that a log-probability of the answer is off."""
    expected = engine.run_in_owner(_logprobs, model, request.prompt + result.tokens)
    errors = [0.0]
    for place, found in enumerate(result.logprobs or (), len(request.prompt) - 1):
        for token, logprob in ((found.token, found.logprob), *found.top):
            errors.append(abs(logprob - expected[place][token]))
    return max(errors)


def _logprobs(model: Any, tokens: tuple[int, ...]) -> Any:
    import mlx.core as mx
    import numpy as np

    from mlops.engine.prefill import new_caches

    logits = model(mx.array([tokens]), cache=new_caches(model)).astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
