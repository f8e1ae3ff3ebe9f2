"""Answers that must follow a schema: valid, whoever shares the batch, and nobody else changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import tiny_models
from engines import TIMEOUT_S, ask_all, running
from mlops import engine
from mlops.engine import Engine, GenerationRequest, LoadedModel, Sampling
from mlops.engine.guidance import json_grammar, lark_grammar
from mlops.errors import EngineError, InvalidRequestError

TEXT = {"type": "string", "maxLength": 8}
NAME = {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"}
DIGITS = {"type": "integer", "minimum": 0, "maximum": 99999}


def record(properties: dict[str, Any], *required: str, **others: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **others,
    }


PERSON = record({"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}}, "name")
SCHEMAS: dict[str, dict[str, Any]] = {
    "empty": record({}),
    "person": record(PERSON["properties"], "name", "age"),
    "optional": PERSON,
    "nested": record({"who": PERSON, "where": record({"city": TEXT}, "city")}, "who", "where"),
    "enum": record({"state": {"enum": ["open", "closed", "in progress"]}}, "state"),
    "mixed enum": record({"value": {"enum": ["a", 1, None, True, {"b": [2]}]}}, "value"),
    "const": record({"version": {"const": "v1"}, "kind": {"const": 7}}, "version", "kind"),
    "array": record({"tags": {"type": "array", "items": TEXT, "maxItems": 4}}, "tags"),
    "counted": record(
        {"all": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5}},
        "all",
    ),
    "tuple": record(
        {
            "point": {
                "type": "array",
                "prefixItems": [DIGITS, DIGITS],
                "items": False,
                "minItems": 2,
            }
        },
        "point",
    ),
    "integers": record({"below": DIGITS, "even": DIGITS | {"multipleOf": 2}}, "below", "even"),
    "numbers": record(
        {"share": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}}, "share"
    ),
    "negative": record(
        {"t": {"type": "integer", "exclusiveMinimum": -40, "exclusiveMaximum": -3}}, "t"
    ),
    "any of": record({"id": {"anyOf": [DIGITS, NAME, {"type": "null"}]}}, "id"),
    "types": record({"id": {"type": ["boolean", "null"]}}, "id"),
    "refs": record({"a": {"$ref": "#/$defs/p"}, "b": {"$ref": "#/$defs/p"}}, "a", "b")
    | {"$defs": {"p": PERSON}},
    "all of": {"allOf": [record({"a": DIGITS, "b": NAME}, "a"), {"required": ["b"]}]},
    "pattern": record({"plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}}, "plate"),
    "unanchored": record({"x": {"type": "string", "pattern": "a[bc]", "maxLength": 6}}, "x"),
    "formats": record(
        {
            "day": {"type": "string", "format": "date"},
            "id": {"type": "string", "format": "uuid"},
            "at": {"type": "string", "format": "ipv4"},
        },
        "day",
        "id",
        "at",
    ),
    "unicode": record({"größe": {"enum": ["groß", "小", "🙂"]}, "ключ": NAME}, "größe", "ключ"),
    "escapes": record({'quo"te\\': {"const": 'a "b" \\ \n c'}}, 'quo"te\\'),
    "records": record(
        {"rows": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3}}, "rows"
    ),
    "string itself": TEXT,
    "array itself": {"type": "array", "items": DIGITS, "minItems": 1, "maxItems": 3},
    "boolean itself": {"type": "boolean"},
}
ENOUGH = 900


def guided(schema: dict[str, Any], text: str = "Tell me: ", **fields: Any) -> GenerationRequest:
    grammar = json_grammar(json.dumps(schema))
    return ask(text, grammar=grammar, **{"max_tokens": ENOUGH, **fields})


def ask(text: str = "Tell me: ", **fields: Any) -> GenerationRequest:
    return GenerationRequest(tuple(text.encode()), **{"max_tokens": 24, **fields})


def hot(seed: int, **others: Any) -> Sampling:
    return Sampling(temperature=1.0, seed=seed, **others)


def check(text: str, schema: dict[str, Any]) -> Any:
    """The value, which follows the schema; formats too."""
    value = json.loads(text)
    jsonschema.validate(
        value,
        schema,
        cls=jsonschema.Draft202012Validator,
        format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
    )
    return value


@pytest.fixture(scope="module")
def one(loaded: LoadedModel) -> Any:
    with running(loaded, max_rows=16) as started:
        yield started


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_follows_its_schema(one: Engine, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=7 if temperature else None)
    requests = [guided(schema, sampling=sampling) for schema in SCHEMAS.values()]
    for (name, schema), result in zip(SCHEMAS.items(), ask_all(one, *requests), strict=True):
        assert result.finish_reason == "stop", (name, result.text)
        check(result.text, schema)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 200},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 5.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logit_bias": ((ord("x") - 33, 100.0), (ord("{") - 33, -100.0))},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 10.0])
def test_no_setting_draws_what_is_forbidden(
    one: Engine, settings: dict[str, Any], temperature: float
) -> None:
    schemas = [SCHEMAS[name] for name in ("person", "nested", "formats", "any of")]
    sampling = Sampling(temperature=temperature, seed=1, **settings)
    requests = [guided(schema, sampling=sampling) for schema in schemas]
    for schema, result in zip(schemas, ask_all(one, *requests), strict=True):
        check(result.text, schema)


def test_a_free_row_is_what_it_is_alone_beside_guided_rows(
    base: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    adapter = tiny_models.write_lora_adapter(tmp_path / "a", base, seed=3)
    free = [
        ask("one", logprobs=2),
        ask("two", sampling=hot(2), max_tokens=60),
        ask("three", adapter="a", sampling=hot(3, top_k=9)),
    ]
    forms = [
        guided(SCHEMAS["nested"]),
        guided(SCHEMAS["records"], sampling=hot(5)),
        guided(SCHEMAS["person"], adapter="a", logprobs=1),
        guided(SCHEMAS["boolean itself"], adapter="a"),
    ]
    with running(loaded, {"a": adapter}, max_rows=8, prefix_memory_bytes=0) as one:
        alone = [ask_all(one, request)[0] for request in [*free, *forms]]
        together = ask_all(one, *free, *forms)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.finish_reason for one in together] == [one.finish_reason for one in alone]
    assert [[t.token for t in one.logprobs] for one in together] == [
        [t.token for t in one.logprobs] for one in alone
    ]


def test_logprobs_are_the_models_own(one: Engine) -> None:
    (free,) = ask_all(one, ask(logprobs=3, max_tokens=1))
    (result,) = ask_all(one, guided(SCHEMAS["person"], logprobs=3))
    assert result.text.startswith("{")
    first = result.logprobs[0]
    assert [token for token, _ in first.top] == [token for token, _ in free.logprobs[0].top]
    assert first.logprob < free.logprobs[0].logprob  # "{" is not what the model likes best


def test_an_answer_that_is_cut_off_says_so(one: Engine) -> None:
    (result,) = ask_all(one, guided(SCHEMAS["nested"], max_tokens=5))
    assert result.finish_reason == "length"
    assert (result.text, len(result.tokens)) == ('{"who', 5)


def test_the_last_token_allowed_may_complete_the_answer(one: Engine) -> None:
    (result,) = ask_all(one, guided({"const": {"a": 1}}, max_tokens=len('{"a": 1}')))
    assert (result.text, result.finish_reason) == ('{"a": 1}', "stop")


def test_a_stop_text_ends_a_guided_answer(one: Engine) -> None:
    (result,) = ask_all(one, guided(SCHEMAS["nested"], stop=('":',)))
    assert (result.text, result.finish_reason) == ('{"who', "stop")


def test_an_open_answer_ends_with_the_end_token(one: Engine) -> None:
    end = one.loaded.tokenizer.eos_token_id
    wants_end = Sampling(logit_bias=((end, 100.0),))
    (result,) = ask_all(one, guided({"type": "integer"}, sampling=wants_end))
    assert result.finish_reason == "stop"
    assert str(int(result.text)) == result.text
    assert len(result.text) <= 2


def test_several_answers_to_one_prompt_each_have_a_guide(one: Engine) -> None:
    request = guided(SCHEMAS["person"], sampling=hot(11))
    results = ask_all(one, *engine.split_choices(request, 3))
    assert len({check(result.text, SCHEMAS["person"])["name"] for result in results}) == 3


def test_rows_with_guides_come_and_go_at_different_times(one: Engine) -> None:
    names = [*SCHEMAS] * 2
    requests = [
        guided(SCHEMAS[name], "x" * (1 + at % 7) * 9, sampling=hot(at))
        if at % 3
        else ask("y" * (1 + at % 5) * 11, max_tokens=1 + at, sampling=hot(at))
        for at, name in enumerate(names)
    ]
    expected = [ask_all(one, request)[0].tokens for request in requests[:12]]
    results = ask_all(one, *requests)
    assert [result.tokens for result in results[:12]] == expected
    for name, request, result in zip(names, requests, results, strict=True):
        if request.grammar is not None:
            check(result.text, SCHEMAS[name])


def test_a_cancelled_answer_frees_its_row_and_harms_nobody(one: Engine) -> None:
    endless = guided({"type": "string", "minLength": 10_000}, max_tokens=800)
    (expected,) = ask_all(one, guided(SCHEMAS["records"]))
    cancelled, other = one.submit(endless), one.submit(guided(SCHEMAS["records"]))
    while one.statistics()["running"] < 2 and not other.future.done():
        pass
    cancelled.cancel()
    assert cancelled.result(TIMEOUT_S).finish_reason == "cancelled"
    assert other.result(TIMEOUT_S).tokens == expected.tokens


def test_a_guide_that_fails_fails_its_own_row(one: Engine) -> None:
    lengths = "|".join(f".{{{number}}}a" for number in range(1, 400))
    explodes = json_grammar(json.dumps({"type": "string", "pattern": f"^({lengths})$"}))
    (expected,) = ask_all(one, guided(SCHEMAS["records"]))
    failing = one.submit(ask(grammar=explodes, sampling=hot(1), max_tokens=900))
    other = one.submit(guided(SCHEMAS["records"]))
    with pytest.raises(InvalidRequestError, match="cannot follow its grammar any further: .*"):
        failing.result(TIMEOUT_S)
    assert other.result(TIMEOUT_S).tokens == expected.tokens


def test_a_lark_grammar_guides_too(one: Engine) -> None:
    schema = '{"type":"boolean","x-guidance":{"whitespace_flexible":false}}'
    grammar = lark_grammar(f'start: "<call>" args "</call>"\nargs: %json {schema}')
    (result,) = ask_all(one, ask(grammar=grammar, max_tokens=40))
    assert result.text in ("<call>true</call>", "<call>false</call>")
    assert result.finish_reason == "stop"


def test_a_grammar_that_is_none_is_refused_before_it_is_queued(one: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="response_format cannot be used"):
        one.submit(ask(grammar=lark_grammar("start: (")))


def test_a_guided_answer_is_streamed_as_it_is_made(one: Engine) -> None:
    import asyncio

    async def read() -> tuple[list[str], str]:
        generation = one.submit(guided(SCHEMAS["records"]))
        pieces = [event.text async for event in generation.events()]
        return pieces, generation.result().text

    pieces, text = asyncio.run(read())
    assert "".join(pieces) == text
    check(text, SCHEMAS["records"])


def test_guides_work_where_the_model_cannot_be_batched(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path / "m", architecture="mamba2")
    loaded = engine.load_model(folder)
    with running(loaded) as one:
        (result,) = ask_all(one, guided(SCHEMAS["person"], sampling=hot(2)))
    check(result.text, SCHEMAS["person"])


def test_logits_beyond_the_tokenizer_are_never_drawn(tmp_path: Path) -> None:
    size = tiny_models.vocabulary_size() + 61
    folder = tiny_models.write_language_model(tmp_path / "m", vocab=size)
    loaded = engine.load_model(folder)
    beyond = tuple((token, 100.0) for token in range(tiny_models.vocabulary_size(), size))
    with running(loaded) as one:
        sampling = hot(3, logit_bias=beyond)
        guided_one, free = ask_all(
            one, guided(SCHEMAS["nested"], sampling=sampling), ask(sampling=sampling)
        )
    check(guided_one.text, SCHEMAS["nested"])
    assert max(free.tokens) >= tiny_models.vocabulary_size()  # it may draw them


@pytest.mark.parametrize("spoil", ["begin", "step"])
def test_a_step_that_fails_fails_its_rows_and_the_engine_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    class Faulty:
        fails = False

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.model, name)

        def __call__(self, ids: Any, cache: Any) -> Any:
            if self.fails:
                self.fails = False
                raise RuntimeError("no such kernel")
            return loaded.model(ids, cache=cache)

    model: Any = Faulty()

    def break_it(started: Engine) -> Any:
        generation = started.submit(guided(SCHEMAS["nested"]))
        for _ in range(4):
            started._guarded_step()
        if spoil == "begin":
            model.fails = True
        else:
            with monkeypatch.context() as patch:
                patch.setattr(started._batch, "_allowed", lambda: 1 / 0)
                started._guarded_step()
        for _ in range(3):
            started._guarded_step()
        return generation

    with running(dataclasses.replace(loaded, model=model)) as started:
        broken: Callable[[Engine], Any] = break_it
        generation = engine.run_in_owner(broken, started)
        with pytest.raises(EngineError, match="no such kernel|ZeroDivisionError"):
            generation.result(TIMEOUT_S)
        (result,) = ask_all(started, guided(SCHEMAS["nested"]))
    check(result.text, SCHEMAS["nested"])
