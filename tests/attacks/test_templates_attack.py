"""Chat templates that never end or make too much, and usual ones rendered as ever."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mlops.engine import chat_template
from mlops.engine.chat_template import render
from mlops.engine.messages import parse_messages, parse_tools
from mlops.errors import InvalidRequestError
from mlops.serving.runner import MLXModelRunner
from tiny_models import CHAT_TEMPLATE, write_language_model

TEMPLATES = Path(__file__).parents[2].parent / "shared" / "templates"
ASKED = parse_messages([{"role": "user", "content": "Hi"}])
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def with_template(template: str) -> Any:
    return SimpleNamespace(
        special_tokens_map=SPECIAL_TOKENS,
        has_thinking=False,
        get_chat_template=lambda _, __: template,
    )


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chat_template, "RENDER_S", 0.5)
    yield
    # Whatever it was, the next conversation is rendered.
    monkeypatch.undo()
    assert render(with_template(CHAT_TEMPLATE), ASKED).endswith("assistant\n")


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over texts": "{% set t = 'a' * 90000 %}"
    "{% for a in t %}{% for b in t %}{% for c in t %}{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{% set n = 9 ** (9 ** 9) %}{{ n % 7 }}",
    "a product of numbers": "{% set n = (10 ** 4000000) * (10 ** 4000000) %}"
    "{% for a in range(99999) %}{% set m = n * n %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "sorting": "{% for a in range(99999) %}{% set b = range(99999) | sort %}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_ended(name: str) -> None:
    with pytest.raises(
        InvalidRequestError, match="refuses messages: it takes more than 0.5 s"
    ) as no:
        render(with_template(ENDLESS[name]), ASKED)
    assert no.value.field == "messages"


LARGE = {
    "text": "{{ 'a' * (10 ** 7) }}",
    "joined": "{{ range(99999) | join(messages[0]['content'] * 999) }}",
    "spaces": "{{ '%2999999d' % 1 }}",
    "form": "{{ '{:>2999999}'.format(1) }}",
    "indented": "{{ messages | tojson(indent=999999) }}",
    "centred": "{{ 'a' | center(2999999) }}",
}


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_makes_too_much_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_S", 30.0)
    with pytest.raises(InvalidRequestError, match="characters of|too much memory"):
        render(with_template(LARGE[name]), ASKED)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits memory so")
@pytest.mark.parametrize(
    "template",
    [
        "{{ ('a' * (10 ** 11)) | length }}",
        "{{ ('%99999999999d' % 1) | length }}",
        "{% set n = namespace(t='a') %}{% for a in range(60) %}{% set n.t = n.t + n.t %}"
        "{% endfor %}",
    ],
)
def test_memory_has_a_limit(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_S", 30.0)
    with pytest.raises(InvalidRequestError, match="too much memory"):
        render(with_template(template), ASKED)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception(messages[0]['content'] * 999999) }}", "HiHiHi"),
        ("{% for %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "__class__"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_what_a_template_refuses_is_said_shortly(template: str, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(with_template(template), ASKED)
    assert said in caught.value.message
    assert len(caught.value.message) < 300


def test_a_process_that_is_killed_is_replaced() -> None:
    (process, *_) = chat_template._processes()._idle
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()


def test_a_model_whose_template_never_ends_answers_prompts(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "tiny")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = ENDLESS["loops"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    runner = MLXModelRunner(folder)
    runner.load_model()
    try:
        with pytest.raises(InvalidRequestError, match="takes more than"):
            runner.predict("Hi")
        assert runner.predict({"prompt": "Hi", "max_tokens": 1})["prediction"]
    finally:
        runner.unload_model()


# What is rendered is what transformers renders.

CALL = {"id": "123456789", "type": "function"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "short": {"messages": [{"role": "user", "content": "Grüß dich <|end|> 'x' \"y\" & <b>"}]},
    "system": {
        "messages": [
            {"role": "system", "content": " Be short.\n"},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "<think>two</think>\n\n2"},
            {"role": "user", "content": "  2 + 2?  "},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "How warm is Zürich?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        **CALL,
                        "function": {"name": "warmth", "arguments": '{"city": "Zürich", "n": 1.5}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "123456789", "name": "warmth", "content": "9 °C"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "warmth",
                    "description": "How warm a city is.",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string", "enum": ["Zürich", "Bern"]}},
                        "required": ["city"],
                    },
                },
            }
        ],
    },
}
FEATURES = (
    "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}"
    "{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}{{ n.i }}"
    "{% generation %}{{ messages | tojson(indent=2) }}{% endgeneration %}"
    "{{ strftime_now('%Y') }}{{ bos_token }}{{ tools }}{{ documents }}{{ enable_thinking }}"
    "{{ dict(a=1) }}{{ 'a\n' }}\n  {% if true %}\n  x\n  {% endif %}\n"
)


def outcome(render_it: Any) -> tuple[str, str]:
    try:
        return "text", render_it()
    except Exception as exc:
        return "error", type(exc).__name__


def check_same(template: str, asked: dict[str, Any]) -> bool:
    """Whether it is rendered at all."""
    messages, tools = parse_messages(asked["messages"]), parse_tools(asked)
    kind, ours = outcome(lambda: render(with_template(template), messages, tools))
    expected, theirs = outcome(
        lambda: render_jinja_template(
            [messages],
            tools=None if tools is None else list(tools.functions),
            chat_template=template,
            add_generation_prompt=True,
            enable_thinking=False,
            **SPECIAL_TOKENS,
        )[0][0]
    )
    assert kind == expected
    assert kind == "error" or ours == theirs
    return kind == "text"


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [FEATURES, CHAT_TEMPLATE], ids=["features", "tiny"])
def test_it_is_rendered_as_transformers_does(template: str, conversation: str) -> None:
    assert check_same(template, CONVERSATIONS[conversation])


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason=f"there are no real templates at {TEMPLATES}")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_real_templates_are_rendered_as_transformers_does(conversation: str) -> None:
    began_s = time.localtime().tm_min  # some write the time
    rendered = [
        check_same(path.read_text(), CONVERSATIONS[conversation])
        for path in sorted(TEMPLATES.glob("*.jinja"))
        if began_s == time.localtime().tm_min
    ]
    assert any(rendered)


@pytest.mark.parametrize(("template", "role"), [("", "system"), ("{# developer #}", "developer")])
def test_a_developer_is_called_as_the_template_knows_it(
    template: str, role: str, tmp_path: Path
) -> None:
    from mlops import engine

    folder = write_language_model(tmp_path / "tiny")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template + CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = engine.load_model(folder)
    request = engine.parse_request({"messages": [{"role": "developer", "content": "a"}]})
    made = engine.to_generation_request(loaded, request, adapter=None)
    said = loaded.tokenizer.decode(list(made.prompt))
    assert said == f"<|start|>{role}\na<|end|>\n<|start|>assistant\n"
    theirs = loaded.tokenizer.apply_chat_template(
        [{"role": role, "content": "a"}], add_generation_prompt=True
    )
    assert list(made.prompt) == theirs
