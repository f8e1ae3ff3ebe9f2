"""Tokenizers that ask for Python code of the checkpoint's own, read from tokenizer.json without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlops.errors import sentence_of

_FROM_TOKENIZER_JSON = {"tokenizer_type": "granite"}
"""A type whose tokenizer in transformers is what tokenizer.json says, and nothing more."""


def load_without_code(folder: Path, **options: Any) -> Any:
    """mlx-lm's `TokenizerWrapper` for the files in a folder; code that they name is not run.

    Args:
        options: further ones of mlx-lm's `load_tokenizer`.

    Raises:
        Exception: whatever transformers and tokenizers raise, a panic of the latter included;
            `tokenizer_problem` says it in words.
    """
    from mlops.engine.mlx_lm import load_tokenizer

    # False, not left out: transformers would ask on the terminal.
    safely = {"trust_remote_code": False, "local_files_only": True}
    try:
        return load_tokenizer(folder, safely, **options)
    except ValueError as exc:
        if not _asks_for_code(exc) or not (folder / "tokenizer.json").exists():
            raise
        return load_tokenizer(folder, safely | _FROM_TOKENIZER_JSON, **options)


def tokenizer_problem(exc: BaseException) -> str:
    """What keeps a tokenizer from being read, on one line, and what to do."""
    if _asks_for_code(exc):
        return (
            "it needs Python code of the checkpoint's own (auto_map in tokenizer_config.json), "
            "which is never run; put the tokenizer.json of the model beside it"
        )
    said = " ".join(sentence_of(exc).split())[:200]
    if type(exc).__name__.startswith("StrictDataclass"):  # transformers reads config.json with it
        return f"config.json beside it is not what transformers takes ({said}); correct it there"
    return f"{said}; copy its files again from where the model comes from"


def _asks_for_code(exc: BaseException) -> bool:
    return "trust_remote_code" in str(exc)
