"""MLX text generation: many requests, many adapters, one batch.

    request (fields, messages)   what may be asked, checked without MLX
    prompts            text or messages -> token ids (chat_template; token_bound: what cannot fit)
    core (config)      the engine: from a request to its result, step by step
    scheduler          who goes next; sequence: one generation under way
    tokenization       tokenizers, of the model and of adapters; end_tokens: what ends an answer
    prefill, rows      prompts into caches; the decode batch
    kv, prefix         what attention remembers, of rows and of earlier requests
    residency          which adapters are in memory; banks, layers: their tensors, used by row
    embedding, pooling texts -> vectors, between the steps of the batch
    sampling, text     logits -> tokens -> text
    guidance           answers of a given form (response_format): what may be drawn next
    tools              calls of functions in a text; tool_grammar: made certain
    statistics         what it has done
    loading            checkpoint -> model in memory (building: mlx-lm's model for its tensors;
                       tokenizer_code: its tokenizer, without code of the checkpoint's own;
                       layout, cpu: as the device likes it; batching: whether requests can share
                       a forward pass)
    servable           what loading would refuse, found without the weights: packaging asks
    owner              the one thread that touches MLX

It knows no web framework, store or tracker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlops.engine.config import EngineConfig
from mlops.engine.embedding import EmbeddingRequest, EmbeddingResult, tokenize_inputs
from mlops.engine.fields import is_longer
from mlops.engine.held_adapter import HeldAdapter
from mlops.engine.loading import LoadedModel, load_model
from mlops.engine.messages import Tools
from mlops.engine.owner import (
    in_owner,
    owner_failure,
    run_in_owner,
    submit_to_owner,
    to_exception,
)
from mlops.engine.prompts import add_grammar, may_need_grammar, to_generation_request
from mlops.engine.request import (
    BASE_NAME,
    PROMPT_FIELDS,
    GenerationRequest,
    Sampling,
    TextRequest,
    parse_request,
    split_choices,
)
from mlops.engine.sequence import Generation, GenerationEvent, GenerationResult, TokenLogprobs
from mlops.engine.text import token_bytes
from mlops.engine.tools import ToolCall, ToolReader, find_form

if TYPE_CHECKING:
    from mlops.engine.core import Engine

__all__ = [
    "BASE_NAME",
    "PROMPT_FIELDS",
    "EmbeddingRequest",
    "EmbeddingResult",
    "Engine",
    "EngineConfig",
    "Generation",
    "GenerationEvent",
    "GenerationRequest",
    "GenerationResult",
    "HeldAdapter",
    "LoadedModel",
    "Sampling",
    "TextRequest",
    "TokenLogprobs",
    "ToolCall",
    "ToolReader",
    "Tools",
    "add_grammar",
    "find_form",
    "in_owner",
    "is_longer",
    "load_model",
    "may_need_grammar",
    "owner_failure",
    "parse_request",
    "run_in_owner",
    "split_choices",
    "submit_to_owner",
    "to_exception",
    "to_generation_request",
    "token_bytes",
    "tokenize_inputs",
]


def __getattr__(name: str) -> Any:
    """`Engine` imports MLX, and the BLAS must be there before that."""
    if name == "Engine":
        from mlops.hardware import ensure_blas

        ensure_blas()
        from mlops.engine.core import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
