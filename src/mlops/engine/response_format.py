"""The field `response_format`: what form an answer must have, as OpenAI's clients ask for it.

    {"type": "text"}                                       anything, as without the field
    {"type": "json_object"}                                some JSON object
    {"type": "json_schema", "json_schema": {"name", "schema", "strict"?, "description"?}}

Source: platform.openai.com/docs/api-reference/chat/create. Whatever is asked for always holds,
whether `strict` or not. Which schemas can be used, `guidance` finds out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlops.engine.fields import check_flag, check_names, invalid, is_encodable, is_longer
from mlops.errors import InvalidRequestError

FIELD = "response_format"
TYPES = ("text", "json_object", "json_schema")
ANY_OBJECT = '{"type":"object"}'
SCHEMA_FIELDS = ("name", "schema", "strict", "description")
MAX_SCHEMA_BYTES = 65536
MAX_NAME_CHARACTERS = 64
OPTIONS = "x-guidance"
"""Where llguidance looks for options in a schema: they are ours to set."""

JSON_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As most JSON on one line is written, the calls in templates too, so what the models have seen.

Where more white space is allowed, a model may write it for ever.
"""


def read_response_format(value: object) -> str | None:
    """The JSON schema, as JSON, that the answer must follow; None is free text.

    Raises:
        InvalidRequestError: names the part that is unknown, missing or not allowed.
    """
    if not isinstance(value, Mapping):
        raise invalid(FIELD, value, "an object with type")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise invalid(f"{FIELD}.type", kind, f"one of {', '.join(TYPES)}")
    check_names(FIELD, value, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    return _read_json_schema(f"{FIELD}.json_schema", value.get("json_schema"))


def write_schema(name: str, schema: object) -> str:
    """A schema as JSON.

    Args:
        name: of the field that brought it, for the message.

    Raises:
        InvalidRequestError: it is no object of JSON types, too large, or sets llguidance's options.
    """
    if not isinstance(schema, Mapping):
        raise invalid(name, schema, "a JSON schema, which is an object")
    if OPTIONS in schema:
        raise InvalidRequestError(f"{name} has the unknown keyword {OPTIONS!r}", name)
    if is_longer(schema, MAX_SCHEMA_BYTES):  # before it is written, which nothing interrupts
        raise InvalidRequestError(f"{name} must be at most {MAX_SCHEMA_BYTES} bytes of JSON", name)
    try:
        written = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError as exc:
        raise InvalidRequestError(f"{name} is nested too deeply", name) from exc
    except (TypeError, ValueError) as exc:
        raise InvalidRequestError(f"{name} cannot be written as JSON: {exc}", name) from exc
    if not is_encodable(written):
        raise InvalidRequestError(f"{name} has half a surrogate pair, which is no character", name)
    num_bytes = len(written.encode())
    if num_bytes > MAX_SCHEMA_BYTES:
        raise InvalidRequestError(
            f"{name} must be at most {MAX_SCHEMA_BYTES} bytes of JSON, not {num_bytes}", name
        )
    return written


def _read_json_schema(name: str, value: object) -> str:
    if not isinstance(value, Mapping):
        raise invalid(name, value, "an object with name and schema")
    check_names(name, value, SCHEMA_FIELDS)
    title = value.get("name")
    if not isinstance(title, str) or not 1 <= len(title) <= MAX_NAME_CHARACTERS:
        raise invalid(f"{name}.name", title, f"a text of 1 to {MAX_NAME_CHARACTERS} characters")
    description = value.get("description")
    if description is not None and not isinstance(description, str):
        raise invalid(f"{name}.description", description, "a text")
    if value.get("strict") is not None:
        check_flag(f"{name}.strict", value["strict"])
    return write_schema(f"{name}.schema", value.get("schema"))
