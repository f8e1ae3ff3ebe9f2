"""Calls of functions: offered through the template, forced by grammar, read from what is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import tiny_models
import tool_models
from mlops import engine
from mlops.engine.messages import parse_tools
from mlops.errors import InvalidRequestError
from mlops.serving.runner import MLXModelRunner
from mlops.serving.runner.base import TextChunk

FORMS = ("json_tools", "mistral", "qwen3_coder", "spelled")
NAME = {"type": "string", "maxLength": 6}
WEATHER = tool_models.function(
    "get_weather", {"city": NAME, "unit": {"enum": ["C", "F"]}}, description="a // b # c"
)
ADD = tool_models.function(
    "add-up",
    {
        "numbers": {"type": "array", "items": {"$ref": "#/$defs/small"}, "maxItems": 3},
        "exactly": {"type": "boolean"},
    },
)
ADD["function"]["parameters"]["$defs"] = {"small": {"type": "integer", "minimum": 0, "maximum": 9}}
NOW = tool_models.function("now")
TOOLS = [WEATHER, ADD, NOW]
SCHEMAS = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}
ASKED = [{"role": "user", "content": "How warm is it?"}]
STRICT = [{**one, "function": {**one["function"], "strict": True}} for one in TOOLS]
MANY = {"max_tokens": 400, "temperature": 1.0, "ignore_eos": False}

Runners = Callable[[str], MLXModelRunner]


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, MLXModelRunner] = {}

    def runner_of(form: str) -> MLXModelRunner:
        if form not in made:
            folder = tmp_path_factory.mktemp("models") / form
            parser = "json_tools" if form == "spelled" else form
            tool_models.write_tool_model(folder, parser, has_tokens=form != "spelled")
            made[form] = MLXModelRunner(folder, engine_config=engine.EngineConfig(max_rows=8))
            made[form].load_model()
        return made[form]

    yield runner_of
    for runner in made.values():
        runner.unload_model()


@pytest.fixture
def runner(runners: Runners) -> MLXModelRunner:
    return runners("json_tools")


def predict(runner: MLXModelRunner, **fields: Any) -> dict[str, Any]:
    return runner.predict({"messages": ASKED, "tools": TOOLS, **MANY, **fields})


def choices_of(prediction: dict[str, Any]) -> list[dict[str, Any]]:
    return prediction.get("choices") or [{**prediction, "text": prediction["prediction"]}]


def check_calls(calls: list[dict[str, str]]) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])


def prompt_of(runner: MLXModelRunner, **fields: Any) -> str:
    request = engine.parse_request({"messages": ASKED, "max_tokens": 1, **fields})
    made = engine.to_generation_request(runner.model, request, adapter=None)
    return str(runner.model.tokenizer.decode(list(made.prompt)))


def test_the_template_is_given_the_functions_and_earlier_calls(runners: Runners) -> None:
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Bern", "unit": "C"}'},
    }
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "9 °C"},
    ]
    said = prompt_of(runners("json_tools"), messages=messages, tools=[WEATHER])
    assert json.loads(said.partition("<tools>\n")[2].partition("\n</tools>")[0]) == WEATHER
    assert (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "unit": "C"}}\n'
        "</tool_call><|end|>\n<|start|>tool\n9 °C<|end|>\n<|start|>assistant\n"
    ) in said
    said = prompt_of(runners("qwen3_coder"), messages=messages)
    assert "<parameter=city>\nBern\n</parameter>" in said


def test_with_the_choice_none_the_model_hears_of_no_function(runner: MLXModelRunner) -> None:
    assert "get_weather" not in prompt_of(runner, tools=TOOLS, tool_choice="none")
    assert "tool_calls" not in predict(runner, tool_choice="none", max_tokens=3)


def test_a_model_without_tools_takes_them_with_the_choice_none_only(tmp_path: Path) -> None:
    plain = MLXModelRunner(tiny_models.write_language_model(tmp_path / "plain"))
    with pytest.raises(InvalidRequestError, match="tools cannot be used with this model") as caught:
        predict(plain)
    assert caught.value.field == "tools"
    assert (
        predict(plain, tool_choice="none", max_tokens=3, ignore_eos=True)["finish_reason"]
        == "length"
    )
    plain.unload_model()


@pytest.mark.parametrize("form", ["json_tools", "mistral", "spelled"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_call_is_always_a_call(runners: Runners, form: str, temperature: float) -> None:
    how = {"temperature": temperature, "n": 4, "parallel_tool_calls": False}
    for choice in choices_of(predict(runners(form), tool_choice="required", **how)):
        assert choice["finish_reason"] == "tool_calls"
        assert choice["text"] == ""
        assert len(choice["tool_calls"]) == 1
        check_calls(choice["tool_calls"])


@pytest.mark.parametrize("form", ["json_tools", "mistral", "spelled"])
def test_a_named_function_is_the_one_that_is_called(runners: Runners, form: str) -> None:
    for name in SCHEMAS:
        choice = {"type": "function", "function": {"name": name}}
        prediction = predict(runners(form), tool_choice=choice)
        assert prediction["finish_reason"] == "tool_calls"
        assert [call["name"] for call in prediction["tool_calls"]] == [name]
        check_calls(prediction["tool_calls"])


@pytest.mark.parametrize("form", ["json_tools", "mistral"])
def test_several_calls_may_be_forced(runners: Runners, form: str) -> None:
    runner = runners(form)
    end = runner.model.tokenizer.eos_token_id
    prediction = predict(
        runner, tool_choice="required", tools=[NOW], logit_bias={str(end): -100}, max_tokens=200
    )
    assert len(prediction["tool_calls"]) > 1
    check_calls(prediction["tool_calls"])
    assert prediction["finish_reason"] == "length"


@pytest.mark.parametrize("form", ["json_tools", "mistral"])
def test_strict_functions_are_called_as_they_are_or_not_at_all(runners: Runners, form: str) -> None:
    runner = runners(form)
    marker = runner.model.tokenizer.convert_tokens_to_ids(tool_models.MARKERS[form][0])
    bias = {str(marker): 9}  # such a model calls now and then
    prediction = predict(runner, tools=STRICT, n=8, seed=3, logit_bias=bias, max_tokens=150)
    calls = [call for choice in choices_of(prediction) for call in choice.get("tool_calls", [])]
    assert calls
    check_calls(calls)
    for choice in choices_of(prediction):
        if choice["finish_reason"] != "length":
            assert tool_models.MARKERS[form][0] not in choice["text"]


def test_a_schema_of_the_answer_leaves_calls_possible(runner: MLXModelRunner) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    marker = runner.model.tokenizer.convert_tokens_to_ids("<tool_call>")
    for bias in (-100, 100):
        how = {"logit_bias": {str(marker): bias}, "parallel_tool_calls": False}
        prediction = predict(runner, response_format=form, **how)
        if bias < 0:
            assert prediction["finish_reason"] == "stop"
            jsonschema.validate(json.loads(prediction["prediction"]), schema)
        else:
            assert prediction["finish_reason"] == "tool_calls"
            assert prediction["prediction"] == ""
            check_calls(prediction["tool_calls"])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice"),
        ({"tools": STRICT}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_refused(
    runners: Runners, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be made certain") as caught:
        predict(runners("qwen3_coder"), **fields)
    assert caught.value.field == field
    assert (
        predict(runners("qwen3_coder"), max_tokens=3, ignore_eos=True)["finish_reason"] == "length"
    )


def test_a_schema_that_no_grammar_can_follow_is_refused(runner: MLXModelRunner) -> None:
    for wrong in ({"type": "nonsense"}, {"$ref": "https://example.org/x"}, {"pattern": "("}):
        broken = tool_models.function("f", {"x": {"type": "string", **wrong}})
        with pytest.raises(InvalidRequestError, match="tools cannot be used") as caught:
            predict(runner, tools=[broken], tool_choice="required")
        assert caught.value.field == "tools"
        free = predict(runner, tools=[broken], max_tokens=2, ignore_eos=True)
        assert free["finish_reason"] == "length"


@pytest.mark.parametrize("n", [1, 3])
def test_chunks_are_the_prediction_in_pieces(runner: MLXModelRunner, n: int) -> None:
    fields = {"messages": ASKED, "tools": TOOLS, "tool_choice": "required", "n": n, "logprobs": 0}

    async def read() -> tuple[list[TextChunk], dict[str, Any]]:
        answer = runner.generate({**fields, **MANY, "seed": 1})
        return [chunk async for chunk in answer.chunks()], await answer.prediction()

    chunks, prediction = asyncio.run(read())
    for index, choice in enumerate(choices_of(prediction)):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == choice["text"]
        calls = [call for chunk in own for call in chunk.tool_calls]
        told = [{"name": call.name, "arguments": call.arguments} for call in calls]
        assert told == choice["tool_calls"]
        assert [chunk.finish_reason for chunk in own if chunk.finish_reason] == [
            choice["finish_reason"]
        ]
        tokens = [token for chunk in own for token in chunk.tokens]
        assert tokens == [entry["token"] for entry in choice["logprobs"]]
        assert all(len(chunk.tokens) == len(chunk.logprobs or ()) for chunk in own)


def test_every_token_has_its_bytes(runner: MLXModelRunner) -> None:
    tokenizer = runner.model.tokenizer
    text = "é <tool_call>\n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    said = runner.token_bytes(tokens)
    assert b"".join(said) == text.encode()
    assert said[:2] == [b"\xc3", b"\xa9"]
    assert runner.token_bytes([tokenizer.eos_token_id, 9999]) == [b"<|end|>", b""]


def test_every_form_of_mlx_lm_is_found(runners: Runners) -> None:
    for form in ("json_tools", "mistral", "qwen3_coder"):
        found = engine.find_form(runners(form).model.tokenizer)
        assert found is not None
        assert found.parser == form
        parsed = parse_tools({"messages": ASKED, "tools": TOOLS})
        assert parsed is not None
        assert engine.ToolReader(found, parsed).add("x").text == "x"
