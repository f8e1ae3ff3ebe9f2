"""Grammars of answers whose calls of functions are certain, in llguidance's Lark.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mlops.engine.chat_template import find_template, is_program
from mlops.engine.messages import Tools
from mlops.engine.response_format import FIELD as RESPONSE_FORMAT
from mlops.engine.response_format import JSON_LAYOUT, OPTIONS
from mlops.engine.tools import ToolForm
from mlops.errors import InvalidRequestError

MISTRAL_ARGUMENTS = "[ARGS]"


def call_grammar(
    tokenizer: Any, form: ToolForm, tools: Tools, json_schema: str | None = None
) -> str | None:
    """The grammar that keeps what a request was promised.

    With the choice `required`, an answer is calls and nothing else: one, unless several are allowed
    and no function is named. With `auto` and a `strict` function, it is text and calls, and every
    call keeps its function's schema. With `auto` and a JSON schema, it is calls, or JSON.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        json_schema: what an answer must follow that calls no function, as JSON.

    Returns:
        None when nothing is promised.

    Raises:
        InvalidRequestError: calls of this form cannot be made certain.
    """
    is_required = tools.choice == "required"
    if not is_required and not tools.has_strict and json_schema is None:
        return None
    if not form.is_json:
        raise InvalidRequestError(*_refusal(tools, json_schema))
    has_text = not is_required and json_schema is None
    # Tagged calls with text between them are repeated with that text.
    has_several = tools.is_parallel and tools.name is None and not (has_text and form.end)
    rules = _rules_of_calls(tokenizer, form, has_several=has_several)
    if is_required:
        rules.append("start: calls")
    elif json_schema is not None:
        schema = {**json.loads(json_schema), OPTIONS: JSON_LAYOUT}
        rules += ["start: calls | answer", f"answer: %json {json.dumps(schema)}"]
    else:
        rules += _rules_of_text(tokenizer, form, tools)
    functions = [tool["function"] for tool in tools.functions]
    chosen = [one for one in functions if tools.name in (None, one["name"])]
    rules.append(f"body: {_any_of('body', len(chosen))}")
    for at, function in enumerate(chosen):
        rules += _rules_of_body(tokenizer, form, at, function)
    return "\n".join(rules)


def _refusal(tools: Tools, json_schema: str | None) -> tuple[str, str]:
    """The sentence, and the field."""
    why = "the form of its calls cannot be made certain"
    if tools.choice == "required":
        return f"tool_choice must be 'auto' or 'none' for this model: {why}", "tool_choice"
    if json_schema is not None:
        return f"response_format cannot go with tools for this model: {why}", RESPONSE_FORMAT
    return f"strict must be false in tools for this model: {why}", "tools"


def _rules_of_calls(tokenizer: Any, form: ToolForm, *, has_several: bool) -> list[str]:
    """The rule `calls`, of calls one after the other, each with a `body`."""
    start = _marker(tokenizer, form.start)
    if form.parser != "mistral":
        more = r' ("\n" call)*' if has_several else ""
        end = _marker(tokenizer, form.end)
        return [f"calls: call{more}", rf'call: {start} "\n" body "\n" {end}']
    if _names_before_arguments(tokenizer):
        return [f"calls: call{'+' if has_several else ''}", f"call: {start} body"]
    more = ' (", " body)*' if has_several else ""
    return [f'calls: {start} "[" body{more} "]"']


def _rules_of_text(tokenizer: Any, form: ToolForm, tools: Tools) -> list[str]:
    """The rule `start`, of text and calls. No text has the marker, not spelled out either.

    llguidance's text has no special tokens, so others than the marker and those that end the answer
    are named: a model may write them, to think for instance.
    """
    start = _find_token(tokenizer, form.start)
    if start is None:
        raise InvalidRequestError(*_refusal(tools, None))
    own = {start, *tokenizer.eos_token_ids}
    others = sorted(set(tokenizer.added_tokens_decoder) - own)
    between = f" (<[{','.join(map(str, others))}]> TEXT)*" if others else ""
    marker = re.escape(form.start).replace("/", r"\/")
    # A call of Mistral's form ends the answer: text after it could not be told from it.
    after = " text" if form.end else ""
    repeated = "*" if form.end and tools.is_parallel else "?"
    return [
        f"start: text (calls{after}){repeated}",
        f"text: TEXT{between}",
        rf"TEXT: /(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/",
    ]


def _rules_of_body(
    tokenizer: Any, form: ToolForm, at: int, function: Mapping[str, Any]
) -> list[str]:
    """The rule `body_{at}`: one function's name and what it may be called with."""
    name = function["name"]
    schema = {**function["parameters"], "type": "object", OPTIONS: JSON_LAYOUT}
    rules = [f"arguments_{at}: %json {json.dumps(schema)}"]
    if form.parser == "mistral" and _names_before_arguments(tokenizer):
        marker = _marker(tokenizer, MISTRAL_ARGUMENTS)
        return [f'body_{at}: "{name}" {marker} arguments_{at}', *rules]
    before = json.dumps(f'{{"name": "{name}", "arguments": ')
    return [f'body_{at}: {before} arguments_{at} "}}"', *rules]


def _any_of(name: str, num: int) -> str:
    return " | ".join(f"{name}_{at}" for at in range(num))


def _names_before_arguments(tokenizer: Any) -> bool:
    """Mistral's newer form: `name[ARGS]{...}` and no list."""
    return not is_program(tokenizer) and MISTRAL_ARGUMENTS in find_template(tokenizer, ())


def _marker(tokenizer: Any, text: str) -> str:
    """A marker in a rule: its token where it has one, as the model has learned it."""
    token = _find_token(tokenizer, text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def _find_token(tokenizer: Any, text: str) -> int | None:
    token = tokenizer.convert_tokens_to_ids(text)
    is_found = token is not None and tokenizer.convert_ids_to_tokens(token) == text
    return int(token) if is_found else None
