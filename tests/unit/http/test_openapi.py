from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from echo_runner import EchoRunner
from schemathesis.specs.openapi.definitions import OPENAPI_31
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from text_runner import ScriptedRunner

from mlops import __version__
from mlops.engine import parse_request
from mlops.engine.request import FIELDS, PROMPT_FIELDS
from mlops.errors import InvalidRequestError
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.docs_page import SWAGGER_FILES
from mlops.serving.http.openapi import Features, describe_api, encode_api, features_of
from mlops.serving.http.operations import OPERATIONS, STATUS_MEANINGS, Offer

ALL = frozenset(Offer) - {Offer.CUSTOM}
DOCS = {"/openapi.json", "/docs.json", "/docs", "/docs/{name}"}
EVERYTHING = HTTPSettings(enable_runtime_adapters=True)
INFO = ServiceInfo("my_service")


def served(runner: Any = None, info: ServiceInfo = INFO, **settings: Any) -> Served:
    return Served(RunnerHost(lambda: runner), info, HTTPSettings(**settings))


def described(*, has_keys: bool = False, offers: frozenset[Offer] = ALL) -> dict[str, Any]:
    return describe_api(Features("my_service", offers, has_keys))


@pytest.mark.parametrize("offers", [ALL, frozenset({Offer.CUSTOM}), frozenset({Offer.METRICS})])
@pytest.mark.parametrize("has_keys", [True, False])
def test_it_is_openapi(offers: frozenset[Offer], has_keys: bool) -> None:
    document = described(offers=offers, has_keys=has_keys)
    jsonschema.Draft202012Validator(OPENAPI_31).validate(document)
    toolkit = f"mlx-mlops {__version__}"
    assert document["info"]["version"] == document["info"]["x-generator"] == toolkit
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    names = {
        f"#/components/{kind}/{name}"
        for kind, named in document["components"].items()
        for name in named
    }
    assert set(references(document)) <= names


@pytest.mark.parametrize(
    ("model_tag", "bento", "version"),
    [
        ("my_model:1.0.0", "2.0.0", "2.0.0"),
        ("my_model:1.0.0", None, "1.0.0"),
        (None, "2.0.0", "2.0.0"),
        (None, None, f"mlx-mlops {__version__}"),
    ],
)
def test_its_version_is_that_of_what_is_served(
    model_tag: str | None, bento: str | None, version: str
) -> None:
    one = served(info=ServiceInfo("my_service", model_tag=model_tag))
    one.version = bento
    info = json.loads(encode_api(features_of(one)))["info"]
    assert info["version"] == version
    assert info["x-generator"] == f"mlx-mlops {__version__}"


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from references(one)


def test_every_route_of_the_app_is_described() -> None:
    app = create_app(Served(RunnerHost(EchoRunner), INFO, EVERYTHING))
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes)
    found = {
        (re.sub(":[a-z]+", "", route.path), method.lower())
        for route in routes
        for method in route.methods or ()
        if method != "HEAD" and route.path not in DOCS
    }
    assert found == {(one.path, one.method) for one in OPERATIONS}


def test_a_name_for_each_operation() -> None:
    paths = described()["paths"].values()
    names = [operation["operationId"] for path in paths for operation in path.values()]
    assert len(set(names)) == len(names)


def test_examples_are_what_the_description_allows() -> None:
    document = described()
    for operation in OPERATIONS:
        if not operation.is_offered(ALL):
            continue
        found = document["paths"][operation.path][operation.method]
        for example in operation.examples.values():
            check(document, found["requestBody"]["content"]["application/json"]["schema"], example)
        if operation.example_answer is not None:
            content = found["responses"]["200"]["content"]
            check(document, content["application/json"]["schema"], operation.example_answer)


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    whole = {"components": document["components"], **schema}
    jsonschema.Draft202012Validator(whole).validate(value)


def test_failures_below_v1_have_the_form_of_openais() -> None:
    document = described()
    for operation in OPERATIONS:
        if operation.is_offered(ALL):
            responses = document["paths"][operation.path][operation.method]["responses"]
            failures = {one["$ref"] for one in responses.values() if "$ref" in one}
            assert failures
            assert all("/OpenAIError" in one for one in failures) == operation.like_openai
            assert operation.like_openai == operation.path.startswith("/v1/")


def test_a_request_for_text_may_fail_in_many_ways() -> None:
    responses = described(has_keys=True)["paths"]["/predict"]["post"]["responses"]
    assert {int(status) for status in responses} == {200, *STATUS_MEANINGS}


def test_keys() -> None:
    document = described(has_keys=True)
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    assert document["security"]
    for path in ("/health", "/livez", "/readyz"):
        assert document["paths"][path]["get"]["security"] == []
        assert "401" not in document["paths"][path]["get"]["responses"]
    assert "401" in document["paths"]["/metrics"]["get"]["responses"]
    assert "security" not in described()


def test_what_a_service_does_not_offer_is_left_out() -> None:
    paths = described(offers=frozenset({Offer.CUSTOM}))["paths"]
    assert set(paths) == {
        "/predict",
        "/v1/models",
        "/v1/models/{id}",
        "/health",
        "/livez",
        "/readyz",
    }


def test_features_of_a_service() -> None:
    assert features_of(served()).offers == {Offer.TEXT, Offer.EMBEDDINGS, Offer.METRICS}
    assert features_of(served(api_keys=("0123456789abcdef",))).has_keys
    custom = served(info=ServiceInfo("s", model_type="custom"), enable_runtime_adapters=True)
    assert features_of(custom).offers == {Offer.CUSTOM, Offer.METRICS}
    off = served(enable_metrics=False, enable_runtime_adapters=True)
    assert features_of(off).offers == {Offer.TEXT, Offer.EMBEDDINGS, Offer.RUNTIME_ADAPTERS}


@pytest.mark.parametrize(
    ("runner", "offers"),
    [(ScriptedRunner, {Offer.TEXT, Offer.METRICS}), (EchoRunner, {Offer.CUSTOM, Offer.METRICS})],
)
def test_features_once_the_model_is_loaded(runner: type[EchoRunner], offers: set[Offer]) -> None:
    one = served(runner())
    one.host.start()
    one.host._loading_ended.result(30)
    try:
        assert features_of(one).offers == offers
    finally:
        one.host.stop()


def predict_fields() -> dict[str, Any]:
    schema: dict[str, Any] = described()["components"]["schemas"]["PredictBody"]
    return {name: one for name, one in schema["properties"].items() if name != "stream"}


def test_predict_has_the_fields_that_the_engine_takes() -> None:
    assert set(predict_fields()) == set(FIELDS)


def limits() -> Iterator[tuple[str, Any, bool]]:
    for name, field in predict_fields().items():
        for option in field.get("anyOf", [field]):
            if option.get("type") == "null":
                yield name, None, True
            if option.get("type") == "boolean":
                yield name, True, name != "parallel_tool_calls"
                yield name, 1, False
            if option.get("type") in ("integer", "number"):
                step = 1 if option["type"] == "integer" else 1e-6
                if "minimum" in option:
                    yield name, option["minimum"], True
                    yield name, option["minimum"] - step, False
                if "exclusiveMinimum" in option:
                    yield name, option["exclusiveMinimum"], False
                    yield name, option["exclusiveMinimum"] + step, True
                if "maximum" in option:
                    yield name, option["maximum"], True
                    yield name, option["maximum"] + step, False


@pytest.mark.parametrize(("name", "value", "is_right"), list(limits()), ids=repr)
def test_the_engine_has_the_limits_that_are_described(
    name: str, value: Any, is_right: bool
) -> None:
    body = {"text": "a", name: value}
    if is_right:
        parse_request(body)
    else:
        with pytest.raises(InvalidRequestError) as caught:
            parse_request(body)
        assert caught.value.field.startswith(name)


@pytest.mark.parametrize("name", PROMPT_FIELDS)
def test_a_prompt_that_is_null(name: str) -> None:
    assert {"type": "null"} not in predict_fields()[name].get("anyOf", ())
    with pytest.raises(InvalidRequestError, match=name):
        parse_request({name: None})


def test_defaults_of_predict_are_the_engines() -> None:
    defaults = {n: one["default"] for n, one in predict_fields().items() if "default" in one}
    assert parse_request({"text": "a", **defaults}) == parse_request("a")
    assert {"temperature", "top_p", "n"} <= set(defaults)


# The page


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(served()), raise_server_exceptions=False)


def test_the_description_is_served_at_two_places(client: TestClient) -> None:
    one, other = client.get("/openapi.json"), client.get("/docs.json")
    assert one.headers["content-type"] == "application/json"
    assert one.json() == other.json() == describe_api(features_of(served()))


def test_the_page_and_all_that_it_loads(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    ours = [address for address in loaded if not address.startswith("data:")]
    assert {f"docs/{name}" for name in (*SWAGGER_FILES, "start.js")} | {"openapi.json"} == set(ours)
    for address in ours:
        response = client.get(f"/{address}")
        assert response.status_code == 200
        assert len(response.content) > 100
    assert "SwaggerUIBundle" in client.get("/docs/start.js").text


def test_the_page_has_no_script_of_its_own_and_allows_none(client: TestClient) -> None:
    page = client.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page.text) == ["", ""]
    assert "<style" not in page.text
    assert "http:" not in page.text
    assert "https:" not in page.text


def test_a_name_cannot_write_into_the_page() -> None:
    app = create_app(served(info=ServiceInfo("</title><script>alert(1)</script>")))
    assert "<script>alert" not in TestClient(app).get("/docs").text


@pytest.mark.parametrize(
    "name", ["nothing.js", "marked.min.js", "..%2f..%2f__init__.py", "%2fetc%2fpasswd", "a/b", ".."]
)
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/docs/{name}").status_code == 404


def test_links_work_behind_a_prefix() -> None:
    app = Starlette(routes=[Mount("/models/a", create_app(served()))])
    client = TestClient(app)
    assert client.get("/models/a/docs").status_code == 200
    assert client.get("/models/a/docs/swagger-ui.css").status_code == 200
    assert client.get("/models/a/openapi.json").json()["servers"] == [{"url": "./"}]


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/", "/openapi.json", "/docs.json", "/docs/start.js"]
)
def test_docs_can_be_turned_off(path: str) -> None:
    client = TestClient(create_app(served(enable_docs=False)), raise_server_exceptions=False)
    response = client.get(path)
    assert response.status_code == 404
    assert "see /docs" not in response.text


def test_ours_stand_in_front_of_another_apps() -> None:
    async def get_other(_: Any) -> PlainTextResponse:
        return PlainTextResponse("theirs")

    inner = Starlette(routes=[Route("/docs.json", get_other), Route("/schema.json", get_other)])
    client = TestClient(create_app(served(), inner=inner))
    assert "/predict" in client.get("/docs.json").json()["paths"]
    assert client.get("/schema.json").text == "theirs"


def test_nothing_is_made_at_import() -> None:
    code = (
        "import sys, mlops.serving.http;"
        "found = {'mlops.serving.http.openapi', 'mlx.core', 'transformers'} & set(sys.modules);"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_can_be_written_as_json() -> None:
    json.dumps(described(), allow_nan=False).encode("utf-8")
