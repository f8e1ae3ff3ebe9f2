"""The description of the API in OpenAPI 3.1, made from the table of routes and bodies' classes.

    operations.OPERATIONS + pydantic classes -> `describe_api` -> /openapi.json, /docs, docs/api.md

What a service does not offer is left out: text routes where the model is a custom one, adapters at
run time where they are off. Nothing is made before somebody asks, and then once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlops import __version__
from mlops.serving.http.host import Status
from mlops.serving.http.operations import (
    INTRODUCTION,
    OPERATIONS,
    STATUS_MEANINGS,
    TAGS,
    Offer,
    Operation,
)
from mlops.serving.http.schemas_openai import OpenAIErrorAnswer
from mlops.serving.http.schemas_service import ErrorAnswer
from mlops.serving.http.served import Served

TOOLKIT = f"mlx-mlops {__version__}"
JSON = "application/json"
EVENTS = "text/event-stream"
_REFERENCE = "#/components/schemas/{model}"
_NAMED = frozenset({"properties", "patternProperties", "$defs"})
_NESTED = frozenset({"items", "anyOf", "oneOf", "allOf", "prefixItems", "additionalProperties"})


@dataclass(frozen=True)
class Features:
    """What a description says of one service.

    Attributes:
        offers: what it has of that which a service may lack.
        has_keys: whether requests must carry an API key.
        version: of what is served; by default the toolkit's, by name.
    """

    title: str
    offers: frozenset[Offer]
    has_keys: bool = False
    version: str = TOOLKIT


def features_of(served: Served) -> Features:
    """What this service offers, as far as it is known: more once its model is loaded."""
    host, settings = served.host, served.settings
    is_custom = served.info.model_type == "custom"
    gives_embeddings = not is_custom
    if host.status is Status.HEALTHY:
        is_custom = host.text_runner is None
        gives_embeddings = getattr(host.runner, "can_embed", False)
    offers = {
        Offer.TEXT: not is_custom,
        Offer.CUSTOM: is_custom,
        Offer.EMBEDDINGS: gives_embeddings,
        Offer.METRICS: settings.enable_metrics,
        Offer.RUNTIME_ADAPTERS: settings.enable_runtime_adapters and not is_custom,
    }
    _, _, model_version = (served.info.model_tag or "").partition(":")
    return Features(
        served.info.service_name,
        frozenset(offer for offer, is_there in offers.items() if is_there),
        bool(settings.api_keys),
        served.version or model_version or TOOLKIT,
    )


@functools.lru_cache(maxsize=8)
def encode_api(features: Features) -> bytes:
    """The description as JSON."""
    return json.dumps(describe_api(features), ensure_ascii=False).encode()


def describe_api(features: Features) -> dict[str, Any]:
    """The OpenAPI document of a service.

    Paths are relative to where the document is, so it is right behind any prefix.
    """
    operations = [one for one in OPERATIONS if one.is_offered(features.offers)]
    schemas, references = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _operation(operation, references, features)
        paths.setdefault(operation.path, {})[operation.method] = described
    used_tags = {operation.tag for operation in operations}
    components: dict[str, Any] = {
        "schemas": schemas,
        "responses": {
            _response_name(status, like_openai): _error_response(status, like_openai, references)
            for like_openai in sorted({one.like_openai for one in operations})
            for status in STATUS_MEANINGS
        },
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": features.title,
            "version": features.version,
            "description": INTRODUCTION,
            "x-generator": TOOLKIT,
        },
        "servers": [{"url": "./"}],
        "tags": [
            {"name": name, "description": text} for name, text in TAGS.items() if name in used_tags
        ],
        "paths": paths,
        "components": components,
    }
    if features.has_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["security"] = [{"bearer": []}, {"header": []}]
    return document


def _operation(
    operation: Operation, references: Mapping[type[Any], Any], features: Features
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description,
    }
    if operation.is_open:
        described["security"] = []
    if operation.parameters:
        described["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "description": text,
                "schema": {"type": "string", "minLength": 1},
                "example": example,
            }
            for name, (text, example) in operation.parameters.items()
        ]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {
                JSON: {
                    "schema": references[operation.body],
                    "examples": {
                        name: {"value": value} for name, value in operation.examples.items()
                    },
                }
            },
        }
    described["responses"] = {
        "200": _answer(operation, references),
        **{str(status): _other(operation, status, references) for status in operation.also},
        **{
            str(status): {
                "$ref": f"#/components/responses/{_response_name(status, operation.like_openai)}"
            }
            for status in sorted(operation.statuses(has_keys=features.has_keys))
        },
    }
    return described


def _answer(operation: Operation, references: Mapping[type[Any], Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content[JSON] = {"schema": references[operation.answer]}
        if operation.example_answer is not None:
            content[JSON]["example"] = operation.example_answer
    for media_type, example in operation.texts.items():
        content[media_type] = {"schema": {"type": "string"}, "example": example}
    if operation.events:
        content[EVENTS] = {
            "schema": _event(*(references[kind] for kind in (*operation.events, operation.error))),
            "example": operation.example_events,
        }
    return {"description": operation.answer_text, "headers": _headers(200), "content": content}


def _event(*data: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an event, whose JSON is one of these; OpenAPI 3.1 has none of whole streams."""
    of_json = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": list(data)},
    }
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [of_json, {"const": "[DONE]"}]}},
    }


def _other(operation: Operation, status: int, references: Mapping[type[Any], Any]) -> Any:
    """An answer that has the form of a good one and another status."""
    return {**_answer(operation, references), "description": operation.also[status]}


def _error_response(
    status: int, like_openai: bool, references: Mapping[type[Any], Any]
) -> dict[str, Any]:
    body = references[OpenAIErrorAnswer if like_openai else ErrorAnswer]
    content = {} if status == 499 else {"content": {JSON: {"schema": body}}}
    return {"description": STATUS_MEANINGS[status], "headers": _headers(status), **content}


def _headers(status: int) -> dict[str, Any]:
    """What comes with an answer of this status."""
    texts = {"X-Request-Id": "The request's own header of this name, or a new id."}
    if status in {429, 503}:
        texts["Retry-After"] = "Seconds after which another try makes sense."
    if status == 401:
        texts["WWW-Authenticate"] = "`Bearer`."
    return {
        name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()
    }


def _response_name(status: int, like_openai: bool) -> str:
    return f"OpenAIError{status}" if like_openai else f"Error{status}"


def _schemas(
    operations: list[Operation],
) -> tuple[dict[str, Any], dict[type[Any], dict[str, Any]]]:
    """The schemas by name, and the reference to each class that operations name."""
    from pydantic.json_schema import models_json_schema

    kinds: dict[tuple[Any, Any], None] = {}
    for operation in operations:
        if operation.body:
            kinds[operation.body, "validation"] = None
        for answer in (operation.answer, *operation.events, operation.error):
            if answer is not None:
                kinds[answer, "serialization"] = None
    references, definitions = models_json_schema(list(kinds), ref_template=_REFERENCE)
    schemas = definitions["$defs"]
    for (kind, _), reference in references.items():
        schema = schemas[reference["$ref"].rpartition("/")[2]]
        # A class's own fields before those that it shares with others.
        properties = schema["properties"]
        own = {name: properties[name] for name in kind.__annotations__ if name in properties}
        schema["properties"] = own | properties
    for schema in schemas.values():
        _tidy(schema)
    return schemas, {kind: reference for (kind, _), reference in references.items()}


def _tidy(schema: Any) -> None:
    """Leave out what says nothing: titles made from names, and null as the default."""
    for inner in _inner(schema):
        if isinstance(inner.get("title"), str):
            del inner["title"]
        if "default" in inner and inner["default"] is None:
            del inner["default"]
        if "patternProperties" in inner:
            inner.setdefault("additionalProperties", False)


def _inner(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within a schema, itself included; but no names of properties."""
    if isinstance(schema, list):
        for one in schema:
            yield from _inner(one)
    elif isinstance(schema, dict):
        yield schema
        for keyword, value in schema.items():
            if keyword in _NAMED:
                for one in value.values():
                    yield from _inner(one)
            elif keyword in _NESTED:
                yield from _inner(value)
