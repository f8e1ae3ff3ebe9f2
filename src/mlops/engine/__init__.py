"""MLX text generation: one model, many adapters, one request or a static batch at a time.

    owner       the one thread that touches MLX
    request     what may be asked, checked without MLX
    loading     checkpoint -> model in memory (layout: as the device likes the weights;
                batching: whether requests can share a forward pass)
    adapters    adapters in memory, put into the model for the time of a generation (layers)
    prompts     text or messages -> token ids
    generation  token ids -> text (sampling, stops)

It knows no web framework, store or tracker.
"""

from mlops.engine.generation import GenerationResult, generate
from mlops.engine.loading import LoadedModel, load_model
from mlops.engine.owner import in_owner, run_in_owner, submit_to_owner, to_exception
from mlops.engine.prompts import to_generation_request
from mlops.engine.request import (
    BASE_NAME,
    GenerationRequest,
    Sampling,
    TextRequest,
    parse_request,
)

__all__ = [
    "BASE_NAME",
    "GenerationRequest",
    "GenerationResult",
    "LoadedModel",
    "Sampling",
    "TextRequest",
    "generate",
    "in_owner",
    "load_model",
    "parse_request",
    "run_in_owner",
    "submit_to_owner",
    "to_exception",
    "to_generation_request",
]
