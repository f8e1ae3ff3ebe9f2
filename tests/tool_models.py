"""Tiny random models whose chat templates have tools, in the forms of real families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models

MARKERS = {
    "json_tools": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
}

# A line break after a tag is left out by transformers, so they are written as texts.
CHATML = (
    r"{% if tools %}{{ '<|start|>system\n<tools>' }}"
    r"{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    r"{{ '\n</tools><|end|>\n' }}{% endif %}"
    r"{% for message in messages %}{{ '<|start|>' + message.role + '\n' + message.content }}"
    r"{% for tool_call in message.tool_calls or [] %}"
    r"{% if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}"
    r"__CALL__{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CALLS = {
    "json_tools": (
        r"""{{ '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}"""
        r"{{ (tool_call.arguments | tojson) + '}\n</tool_call>' }}"
    ),
    "mistral": "[TOOL_CALLS]{{ tool_call.name }}[ARGS]{{ tool_call.arguments | tojson }}",
    "qwen3_coder": (
        "{{ '\n' }}<tool_call>\n<function={{ tool_call.name + '>\\n' }}"
        r"{% for name, value in tool_call.arguments.items() %}"
        r"{{ '<parameter=' + name + '>\n' + value + '\n</parameter>\n' }}{% endfor %}"
        r"{{ '</function>\n</tool_call>' }}"
    ),
}


def write_tool_model(
    folder: Path, form: str = "json_tools", *, has_tokens: bool = True, **how: Any
) -> Path:
    """Write a language model whose template has tools; returns its folder.

    Args:
        form: the name of mlx-lm's parser that reads its calls.
        has_tokens: whether the form's markers are tokens of their own.
        how: arguments of `tiny_models.write_language_model`.
    """
    num_tokens = tiny_models.vocabulary_size()
    vocab = num_tokens + (2 if has_tokens else 0)
    tiny_models.write_language_model(folder, vocab=vocab, **how)
    size = _read(folder / "config.json")
    _write(folder / "config.json", {**size, "max_position_embeddings": 4096})  # a byte is a token
    config = _read(folder / "tokenizer_config.json")
    config["chat_template"] = CHATML.replace("__CALL__", CALLS[form])
    _write(folder / "tokenizer_config.json", config)
    if has_tokens:
        tokenizer = _read(folder / "tokenizer.json")
        tokenizer["added_tokens"] += [
            {**tokenizer["added_tokens"][0], "id": num_tokens + at, "content": text}
            for at, text in enumerate(MARKERS[form])
        ]
        _write(folder / "tokenizer.json", tokenizer)
    return folder


def function(name: str, properties: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A function as a request has it; every property is required and no other allowed."""
    properties = properties or {}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, **fields}}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
