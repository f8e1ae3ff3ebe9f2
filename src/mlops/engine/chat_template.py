"""Conversations in the model's own form: its chat template, rendered where it can be ended.

    messages, tools -> JSON -> `template_process` -> text

Templates come with checkpoints, and what they cost depends on what clients send. Rendered in a
thread, one that never ends would keep it for good. The way to the process and back takes about
0.2 ms for a usual conversation.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from mlops.engine.fields import is_encodable
from mlops.engine.helper_process import HelperProcess
from mlops.engine.messages import Tools
from mlops.errors import InvalidRequestError

RENDER_S = 5.0
"""A conversation must be rendered in this time; 1 ms is usual, 0.1 s for one of megabytes."""

MAX_IDLE = 2
"""Processes that wait for the next conversation: one for short prompts, one for long ones."""


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Tools | None = None,
    source: str = "messages",
    *,
    begins_answer: bool = True,
) -> str:
    """The text of a conversation, as `apply_chat_template` of transformers makes it.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, of a model that has a template (`find_template`).
        messages: as `parse_messages` gives them.
        source: the field that brought them, for the message.
        begins_answer: whether the text ends with what the model's answer begins with.

    Raises:
        InvalidRequestError: the template refuses them, takes too long or makes too much of them.
        EngineError: the process that renders cannot be started.
    """
    offered = None if tools is None else list(tools.functions)
    asked = {
        **tokenizer.special_tokens_map,
        "enable_thinking": tokenizer.has_thinking,  # as mlx-lm has it
        "messages": [dict(message) for message in messages],
        "tools": offered,
        "documents": None,  # templates may ask for them, and would find them undefined
        "chat_template": find_template(tokenizer, offered, source),
        "add_generation_prompt": begins_answer,
    }
    line = json.dumps(asked, default=str).encode("ascii")
    answer = _processes().ask(line, RENDER_S)
    if answer is None:
        raise refuse(source, f"it takes more than {RENDER_S:g} s")
    rendered = json.loads(answer)
    if "error" in rendered:
        raise refuse(source, rendered["error"])
    text: str = rendered["text"]
    if not is_encodable(text):
        raise refuse(source, "it makes half a surrogate pair, which is no character")
    return text


def find_template(
    tokenizer: Any, offered: Sequence[Mapping[str, Any]] | None, source: str = "messages"
) -> str:
    """The template that a conversation is rendered with, by the rule of transformers.

    Of several, that is `tool_use` where functions are offered and there is one, else `default`.
    Others, such as `rag`, are never used.

    Raises:
        InvalidRequestError: there is none for such a conversation.
    """
    try:
        template: str = tokenizer.get_chat_template(None, offered)
    except ValueError as exc:
        names = ", ".join(sorted(tokenizer.chat_template or ()))
        raise InvalidRequestError(
            f"the model has no chat template for {source}, only others ({names}): offer functions, "
            "or send text or prompt instead",
            source,
        ) from exc
    return template


def is_program(tokenizer: Any) -> bool:
    """Whether a program of mlx-lm's own renders conversations, and no template."""
    return getattr(tokenizer, "_chat_template", None) is not None or tokenizer.chat_template is None


def refuse(source: str, reason: str) -> InvalidRequestError:
    """The error of a conversation that the template does not take."""
    return InvalidRequestError(f"the model's chat template refuses {source}: {reason}", source)


class _Processes:
    """Any thread may ask; each that does so at the same time has a process of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[HelperProcess] = []

    def ask(self, line: bytes, timeout_s: float) -> bytes | None:
        with self._lock:
            process = self._idle.pop() if self._idle else HelperProcess("template_process.py")
        try:
            return process.ask(line, timeout_s)
        finally:
            with self._lock:
                if len(self._idle) < MAX_IDLE:
                    self._idle.append(process)
                    process = None  # type: ignore[assignment]
            if process is not None:
                process.end()


@functools.cache
def _processes() -> _Processes:
    return _Processes()
