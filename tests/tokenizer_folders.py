"""Tokenizers as people have them: with named templates, other end tokens, added tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from mlops.checkpoints import Checkpoint, CheckpointKind

TEMPLATES = Path(__file__).parents[2] / "shared" / "templates"
SKIPPED = f"real chat templates are not at {TEMPLATES}"
NUM_ROWS = 320
"""Rows of the embedding: more than the tokenizer has tokens, as real models have."""


def real_template(name: str) -> str:
    """A well-known model's template; skips the test where they are not."""
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists():
        pytest.skip(SKIPPED)
    return path.read_text(encoding="utf-8")


def write_tokenizer(
    folder: Path,
    *,
    templates: dict[str, str] | str | None = tiny_models.CHAT_TEMPLATE,
    layout: str = "config",
    added: tuple[str, ...] = (),
    **settings: Any,
) -> Path:
    """Write a tokenizer; returns its folder.

    Args:
        templates: one, or several by name.
        layout: where they are: `config` (`tokenizer_config.json`), `files` (`chat_template.jinja`
            and `additional_chat_templates`) or `processor` (`chat_template.json`).
        added: further added tokens, from id 259 on.
        settings: of `tokenizer_config.json`; None takes one away.
    """
    tiny_models.write_tokenizer(folder)
    config = read(folder / "tokenizer_config.json") | settings
    del config["chat_template"]
    write(folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})
    write_templates(folder, templates, layout)
    add_tokens(folder, added)
    return folder


def write_templates(
    folder: Path, templates: dict[str, str] | str | None, layout: str = "config"
) -> None:
    """Add chat templates to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "processor":
        write(folder / "chat_template.json", {"chat_template": templates})
    elif layout == "files":
        named = templates if isinstance(templates, dict) else {"default": templates}
        for name, text in named.items():
            file = folder / "additional_chat_templates" / f"{name}.jinja"
            file = folder / "chat_template.jinja" if name == "default" else file
            file.parent.mkdir(exist_ok=True)
            file.write_text(text or "", encoding="utf-8")
    elif templates is not None:
        if isinstance(templates, dict):
            told: Any = [{"name": name, "template": text} for name, text in templates.items()]
        else:
            told = templates
        path = folder / "tokenizer_config.json"
        write(path, (read(path) if path.exists() else {}) | {"chat_template": told})


def add_tokens(folder: Path, added: tuple[str, ...], first: int = 259) -> None:
    """Add special tokens to `tokenizer.json`."""
    tokenizer = read(folder / "tokenizer.json")
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": first + at, "content": text}
        for at, text in enumerate(added)
    ]
    write(folder / "tokenizer.json", tokenizer)


def checkpoint_of(folder: Path, **config: Any) -> Checkpoint:
    """What is recognised of a model whose tokenizer lies here, without any weights."""
    config = {"model_type": "llama", "vocab_size": NUM_ROWS, **config}
    write(folder / "config.json", config)
    return Checkpoint(
        path=folder,
        kind=CheckpointKind.LANGUAGE_MODEL,
        format="transformers",
        framework="transformers",
        description="a language model",
        weight_files=(),
        weight_bytes=0,
        has_tokenizer=True,
        config=config,
    )


def read(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")
