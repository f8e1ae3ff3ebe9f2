"""The `openai` package against a real server with tiny models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema
import openai
import pytest
import uvicorn
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel, Field

import embedding_models
import tiny_models
import tool_models
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.runner import MLXModelRunner

LONG_S = 60.0
KEY = "a-key-of-the-test"
MODEL = "tiny"
HELLO = [{"role": "user", "content": "Hello"}]
CITY = {"type": "string", "maxLength": 4}
WEATHER = tool_models.function("get_weather", {"city": CITY, "unit": {"enum": ["C", "F"]}})
NOW = tool_models.function("now")
SCHEMAS = {one["function"]["name"]: one["function"]["parameters"] for one in (WEATHER, NOW)}


class Forecast(BaseModel):
    """What `parse` asks for."""

    degrees: int = Field(ge=-9, le=99)
    unit: Literal["C", "F"]
    is_sunny: bool


@contextlib.contextmanager
def serving(host: RunnerHost, settings: HTTPSettings | None = None) -> Iterator[str]:
    """The address of the API, until the block ends; the host is the caller's."""
    served = Served(host, ServiceInfo(MODEL), settings or HTTPSettings(log_requests=False))
    server = uvicorn.Server(uvicorn.Config(create_app(served), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def loaded(runner: MLXModelRunner) -> Iterator[RunnerHost]:
    host = RunnerHost(lambda: runner)
    host.start()
    try:
        wait_for(lambda: host.status != "loading")
        assert host.failure is None
        yield host
    finally:
        host.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


@dataclass
class Addresses:
    """Of the same model: open to all, and with a key and a limit."""

    url: str
    guarded_url: str


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    folder = tmp_path_factory.mktemp("models")
    base = tool_models.write_tool_model(folder / "base")
    formal = tiny_models.write_lora_adapter(folder / "formal", base, scale=40.0)
    guarded = HTTPSettings(api_keys=(KEY,), requests_per_minute=2, log_requests=False)
    with (
        loaded(MLXModelRunner(base, adapters={"formal": formal})) as host,
        serving(host) as url,
        serving(host, guarded) as guarded_url,
    ):
        yield Addresses(url, guarded_url)


@pytest.fixture(scope="module")
def client(addresses: Addresses) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=addresses.url, api_key="none", max_retries=0) as one:
        yield one


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": MODEL, "prompt": "Hello", "max_tokens": 8, "seed": 3, **fields}
    return client.completions.create(**asked)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 8, "seed": 3, **fields}
    return client.chat.completions.create(**asked)


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = complete(client, n=2, extra_body={"top_k": 40, "ignore_eos": True})
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert {choice.finish_reason for choice in whole.choices} == {"length"}
    assert whole.usage.completion_tokens == 16
    streamed = ["", ""]
    events = complete(
        client,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 40, "ignore_eos": True},
    )
    usage = None
    for event in events:
        usage = event.usage or usage
        for choice in event.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]
    assert usage.total_tokens == whole.usage.total_tokens


def test_several_prompts_are_answered_as_each_alone(client: openai.OpenAI) -> None:
    prompts = ["Hello", "Good day", "A"]
    alone = [complete(client, prompt=one, n=2).choices for one in prompts]
    together = complete(client, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    texts = [choice.text for choice in together.choices]
    assert texts == [choice.text for choices in alone for choice in choices]
    token_ids = [list(b"Hello"), list(b"Good day")]
    assert len(complete(client, prompt=token_ids).choices) == 2
    streamed = [""] * 6
    for event in complete(client, prompt=prompts, n=2, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == texts


def test_one_prompt_that_is_refused_refuses_all(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, prompt=[[1], [10**9]], max_tokens=1000, stream=stream)
        assert caught.value.param == "prompt"


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    (choice,) = complete(client, logprobs=3, extra_body={"ignore_eos": True}).choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 8
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert top[token] == logprob < 0
        assert len(top) in (3, 4)
        assert sum(map(math.exp, top.values())) < 1.001
    assert told.text_offset == sorted(told.text_offset)


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = chat(client)
    assert whole.object == "chat.completion"
    message = whole.choices[0].message
    assert (message.role, message.tool_calls) == ("assistant", None)
    content, usage = "", None
    for event in chat(client, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        for choice in event.choices:
            content += choice.delta.content or ""
    assert content == message.content
    assert usage.total_tokens == whole.usage.total_tokens


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=2, temperature=0).choices
    content = choice.logprobs.content
    assert (
        b"".join(map(bytes, (one.bytes for one in content)))
        .decode(errors="replace")
        .startswith(choice.message.content[:1])
    )
    for one in content:
        assert len(one.top_logprobs) == 2
        assert one.logprob == one.top_logprobs[0].logprob
        assert one.bytes == one.top_logprobs[0].bytes


def test_adapters_by_name(client: openai.OpenAI) -> None:
    said = {
        model: chat(client, model=model, temperature=0).choices[0].message.content
        for model in (MODEL, "base", "formal", "base:formal")
    }
    assert said[MODEL] == said["base"] != said["formal"] == said["base:formal"]


def test_models(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {MODEL, "formal"}
    assert cards["formal"].model_extra["parent"] == MODEL
    assert cards[MODEL].model_extra["max_model_len"] == 4096
    assert client.models.retrieve("formal") == cards["formal"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def check_call(call: Any) -> None:
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert len(call.id) == 9
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, SCHEMAS[call.function.name])


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_functions_are_called_and_answered(client: openai.OpenAI, choice: Any) -> None:
    asked = {"tools": [WEATHER, NOW], "tool_choice": choice, "max_completion_tokens": 400}
    message = chat(client, **asked).choices[0].message
    assert message.content is None
    for call in message.tool_calls:
        check_call(call)
    # The conversation goes on as every client writes it.
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
    ]
    answer = chat(client, messages=[*HELLO, message, *results], tools=[WEATHER, NOW])
    assert answer.choices[0].message.role == "assistant"


def test_calls_in_a_stream(client: openai.OpenAI) -> None:
    asked = {"tools": [WEATHER], "tool_choice": "required", "max_completion_tokens": 400}
    whole = chat(client, **asked).choices[0].message.tool_calls
    streamed: dict[int, list[str]] = {}
    reason = None
    for event in chat(client, stream=True, **asked):
        (choice,) = event.choices
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            said = streamed.setdefault(call.index, ["", ""])
            said[0] += call.function.name or ""
            said[1] += call.function.arguments or ""
    assert [streamed[index] for index in sorted(streamed)] == [
        [call.function.name, call.function.arguments] for call in whole
    ]
    assert reason == "tool_calls"


def test_structured_output(client: openai.OpenAI) -> None:
    for n in (1, 3):
        answer = client.chat.completions.parse(
            model=MODEL, messages=HELLO, response_format=Forecast, n=n, max_completion_tokens=200
        )
        assert len(answer.choices) == n
        assert all(isinstance(choice.message.parsed, Forecast) for choice in answer.choices)
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, response_format=Forecast, max_completion_tokens=200
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Forecast)
    schema = {"name": "forecast", "schema": Forecast.model_json_schema()}
    text = complete(
        client,
        max_tokens=200,
        extra_body={"response_format": {"type": "json_schema", "json_schema": schema}},
    )
    Forecast.model_validate_json(text.choices[0].text)


def test_async_clients_at_once(addresses: Addresses) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=addresses.url, api_key="none") as client:

            async def ask(number: int) -> str:
                asked = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "seed": number}
                said = ""
                async for event in await client.chat.completions.create(**asked, stream=True):
                    said += event.choices[0].delta.content or ""
                whole = await client.chat.completions.create(**asked)
                assert whole.choices[0].message.content == said
                return said

            return await asyncio.gather(*map(ask, range(8)))

    assert len(set(asyncio.run(ask_all()))) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"temperature": 99}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_completion_tokens": 10**6}, openai.BadRequestError, "max_completion_tokens"),
        ({"service_tier": "auto"}, openai.BadRequestError, "service_tier"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "messages[0].content[0].type",
        ),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format.type"),
        ({"tools": [{}]}, openai.BadRequestError, "tools[0].type"),
    ],
)
def test_errors_have_their_class(
    client: openai.OpenAI, fields: Any, kind: type[openai.APIStatusError], param: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        chat(client, stream=stream, **fields)
    assert caught.value.param == param
    assert caught.value.request_id


def test_keys_and_limits(addresses: Addresses) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=addresses.guarded_url, api_key=key, max_retries=0)

    with client("wrong") as one, pytest.raises(openai.AuthenticationError):
        chat(one)
    with client(KEY) as one:
        for _ in range(2):
            assert chat(one).choices
        with pytest.raises(openai.RateLimitError) as caught:
            chat(one)
        assert int(caught.value.response.headers["retry-after"]) > 0


def test_embeddings(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = embedding_models.write_embedding_model(tmp_path_factory.mktemp("models") / "vectors")
    texts = ["Hello", "Good day"]
    with (
        loaded(MLXModelRunner(folder)) as host,
        serving(host) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        as_base64 = client.embeddings.create(model=MODEL, input=texts)  # what it asks for itself
        as_numbers = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    for one, other in zip(as_base64.data, as_numbers.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
        assert math.hypot(*one.embedding) == pytest.approx(1.0, abs=1e-5)
