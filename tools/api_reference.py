"""Write docs/api.md from the description of the API: `python tools/api_reference.py`.

openapi.describe_api -> OpenAPI document -> headings, tables and examples in Markdown

The examples are blocks that tests/docs runs, against the service at the top of the page.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlops.serving.http.openapi import EVENTS, JSON, Features, describe_api
from mlops.serving.http.operations import OPERATIONS, STATUS_MEANINGS, Offer, Operation

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
URL = "http://localhost:3000"

HEAD = """\
# API reference

Made by `make docs` from the service's own description, which every service has at `/openapi.json`.
At `/docs` it has a page where each route can be tried.

{introduction}

With API keys, requests carry one of them: `Authorization: Bearer KEY` or `X-API-Key: KEY`.
Every answer has an `X-Request-Id`: the request's own, or a new one.

Contents: {contents}

The examples on this page ask this service:

```python file=service.py
from mlops.serving.bentoml.service import create_bentoml_service

svc = create_bentoml_service(
    "models/my_model",
    service_name="my_service",
    adapters={{"support": "outputs/checkpoints/checkpoint_epoch_2"}},
    config={{"http": {{"enable_runtime_adapters": True, "adapter_folder": "outputs/checkpoints"}}}},
)
```

```bash background
bentoml serve service:svc
```
"""

FAILURES = """\
## Failures

| status | what it means |
|---|---|
{rows}

Below `/v1` the body has the form of OpenAI's API:

```bash
curl -X POST {url}/v1/completions -H "Content-Type: application/json" \\
  -d '{{"model": "my_service", "prompt": "Hello", "temperature": -1}}'
```

```json response
{{
  "error": {{
    "message": "temperature must be a number from 0 to 10, not -1",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": null
  }}
}}
```

Elsewhere:

```bash
curl -X POST {url}/predict -H "Content-Type: application/json" \\
  -d '{{"text": "Hello", "temperature": -1}}'
```

```json response
{{
  "error": {{
    "type": "InvalidRequestError",
    "message": "temperature must be a number from 0 to 10, not -1",
    "field": "temperature"
  }}
}}
```
"""


def make_reference() -> str:
    """The whole page."""
    offers = frozenset(Offer) - {Offer.CUSTOM}
    document = describe_api(Features("my_service", offers))
    operations = [one for one in OPERATIONS if one.is_offered(offers)]
    page = _Page(document)
    tags = [tag["name"] for tag in document["tags"]]
    parts = [
        HEAD.format(
            introduction=_wrap(document["info"]["description"]),
            contents=" · ".join(_link(name) for name in [*tags, "Failures", "Types"]),
        )
    ]
    for tag in document["tags"]:
        parts.append(f"## {tag['name']}\n\n{tag['description']}\n")
        parts += [page.operation(one) for one in operations if one.tag == tag["name"]]
    rows = "\n".join(f"| {status} | {text} |" for status, text in STATUS_MEANINGS.items())
    parts += [FAILURES.format(rows=rows, url=URL), "## Types\n"]
    parts += page.types()
    return "\n".join(parts)


class _Page:
    """What the parts of the page have in common: the schemas, and which of them are shown."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._schemas: Mapping[str, Any] = document["components"]["schemas"]
        self._asked_for: dict[str, None] = {}

    def operation(self, operation: Operation) -> str:
        """One method of one route."""
        described = self._document["paths"][operation.path][operation.method]
        parts = [f"### {operation.method.upper()} {operation.path}", operation.summary + "."]
        parts[-1] += f" {operation.description}"
        if wanted := [one.value for one in Offer if one in operation.needs - {Offer.TEXT}]:
            parts.append(f"Needs {' and '.join(wanted)}.")
        if parameters := described.get("parameters"):
            rows = [f"| `{one['name']}` | {one['description']} |" for one in parameters]
            parts.append("\n".join(["| in the path | meaning |", "|---|---|", *rows]))
        if body := described.get("requestBody"):
            parts.append(self._fields(body["content"][JSON]["schema"], with_default=True))
        good = described["responses"]["200"]
        parts += list(self._answer(good))
        failures = [status for status in described["responses"] if status != "200"]
        parts.append(f"Failures: {', '.join(failures)}.")
        parts += list(self._example(operation))
        return "\n\n".join(parts) + "\n"

    def types(self) -> list[str]:
        """The schemas that others refer to, and those that these refer to."""
        parts: dict[str, str] = {}
        while missing := [name for name in self._asked_for if name not in parts]:
            for name in missing:
                schema = self._schemas[name]
                table = self._fields({"$ref": f"#/{name}"}, with_default=_is_asked(schema))
                parts[name] = f"### {name}\n\n{schema.get('description', '')}\n\n{table}\n"
        return [parts[name] for name in sorted(parts)]

    def _answer(self, answer: Mapping[str, Any]) -> Iterator[str]:
        content = answer["content"]
        yield f"Answer: {answer['description']}"
        if JSON in content:
            yield self._fields(content[JSON]["schema"], with_default=False)
        if EVENTS in content:
            yield "Events of a stream:"
            data, _ = content[EVENTS]["schema"]["properties"]["data"]["anyOf"]
            yield self._fields(data["contentSchema"]["anyOf"][0], with_default=False)
        if texts := [f"`{one}`" for one in content if one not in {JSON, EVENTS}]:
            yield f"As text: {', '.join(texts)}."

    def _example(self, operation: Operation) -> Iterator[str]:
        path = operation.path
        for name, (_, example) in operation.parameters.items():
            path = path.replace(f"{{{name}}}", example)
        if operation.body is None:
            yield f"```bash\ncurl {URL}{path}\n```"
        else:
            body = next(iter(operation.examples.values()))
            yield _curl(path, body)
        if operation.example_answer is not None:
            if Offer.EMBEDDINGS in operation.needs:  # the served model has none: not run
                yield f"The answer: `{json.dumps(operation.example_answer)}`"
            else:
                yield f"```json response\n{_pretty(operation.example_answer)}\n```"
        elif operation.body is not None:
            yield f"```text output\n{operation.texts['text/plain']}\n```"
        if operation.events:
            yield _curl(path, operation.examples["stream"], "-N ")
            yield "```text output\ndata: {…\n…\ndata: [DONE]\n```"

    def _fields(self, schema: Mapping[str, Any], *, with_default: bool) -> str:
        """The fields of an object as a table."""
        named = self._schemas[schema["$ref"].rpartition("/")[2]]
        required = set(named.get("required", ()))
        columns = ["field", "type", *(["default"] if with_default else []), "meaning"]
        rows = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        properties: Mapping[str, Any] = named.get("properties", {})
        for name in sorted(properties, key=lambda name: name not in required):
            field = properties[name]
            default = ""
            if name in required:
                default = "required"
            elif "default" in field:
                default = f"`{json.dumps(field['default'])}`"
            kind = self._type(field)
            # Null is a field left out, which is said once; one that is always there may have it.
            if name in required and {"type": "null"} in field.get("anyOf", ()):
                kind += " or null"
            cells = [f"`{name}`", kind, *([default] if with_default else [])]
            rows.append(f"| {' | '.join([*cells, field.get('description', '')])} |")
        if not properties:
            return "Any fields."
        return "\n".join(rows)

    def _type(self, schema: Mapping[str, Any]) -> str:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            self._asked_for[name] = None
            return _link(name)
        if options := schema.get("anyOf"):
            return " or ".join(self._type(one) for one in options if one.get("type") != "null")
        if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
            return ", ".join(f"`{one}`" for one in values)
        kind = schema.get("type", "anything")
        if kind == "array":
            return f"list{_limits(schema, 'Items')} of {self._type(schema['items'])}"
        named = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
        if kind == "object" and isinstance(named[0], dict):
            return f"object of {self._type(named[0])}"
        return _plain_type(kind, schema)


def _is_asked(schema: Mapping[str, Any]) -> bool:
    """Whether it is a part of requests: they are checked strictly, answers may have more."""
    return schema.get("additionalProperties") is False


def _plain_type(kind: str, schema: Mapping[str, Any]) -> str:
    if pattern := schema.get("pattern"):
        return f"text like `{pattern}`".replace("|", "\\|")
    name = {"boolean": "true or false", "string": "text"}.get(kind, kind)
    return name + _limits(schema, "Length" if kind == "string" else "imum")


def _limits(schema: Mapping[str, Any], what: str) -> str:
    """The limits of a number, or of the size of something, in brackets."""
    low, high = _number(schema.get(f"min{what}")), _number(schema.get(f"max{what}"))
    if above := _number(schema.get("exclusiveMinimum")):
        return f" (above {above}, at most {high})" if high else f" (above {above})"
    if low and high:
        return f" ({low} to {high})"
    if high:
        return f" (at most {high})"
    if low and what == "Length":
        return " (not empty)"
    return f" (at least {low})" if low else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:g}"


def _curl(path: str, body: Any, options: str = "") -> str:
    return (
        f"```bash\ncurl {options}-X POST {URL}{path} \\\n"
        f'  -H "Content-Type: application/json" \\\n  -d {shlex.quote(_pretty(body))}\n```'
    )


def _pretty(value: Any) -> str:
    """JSON that is short where it can be."""
    short = json.dumps(value, ensure_ascii=False)
    return short if len(short) <= 80 else json.dumps(value, ensure_ascii=False, indent=2)


def _link(name: str) -> str:
    return f"[{name}](#{name.lower().replace(' ', '-')})"


def _wrap(text: str) -> str:
    """Paragraphs in lines of at most 100 characters."""
    held = re.sub("`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)  # not broken in code
    return "\n\n".join(textwrap.fill(one, 100) for one in held.split("\n\n")).replace("\0", " ")


if __name__ == "__main__":
    PAGE.write_text(make_reference(), encoding="utf-8")
