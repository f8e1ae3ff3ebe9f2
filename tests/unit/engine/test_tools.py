"""Calls found in a text, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import glm47, json_tools, kimi_k2, mistral, pythonic, qwen3_coder

from mlops.engine.messages import parse_tools
from mlops.engine.tools import (
    MAX_CALL_CHARACTERS,
    MAX_OCCURRENCES,
    Said,
    ToolCall,
    ToolForm,
    ToolReader,
    find_form,
)

F = ToolCall("f", '{"x": 1}')
G = ToolCall("g", "{}")
F_TEXT = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
G_TEXT = '<tool_call>{"name": "g"}</tool_call>'


def form_of(module: Any) -> ToolForm:
    tokenizer = SimpleNamespace(
        has_tool_calling=True,
        tool_parser=module.parse_tool_call,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
    )
    form = find_form(tokenizer)
    assert form is not None
    return form


JSON_TOOLS, MISTRAL, CODER = form_of(json_tools), form_of(mistral), form_of(qwen3_coder)


def reader_of(form: ToolForm = JSON_TOOLS, **fields: Any) -> ToolReader:
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    parsed = parse_tools({"messages": [], "tools": tools, **fields})
    assert parsed is not None
    return ToolReader(form, parsed)


def read(*pieces: str, form: ToolForm = JSON_TOOLS, was_cut: bool = False, **fields: Any) -> Said:
    reader = reader_of(form, **fields)
    said = Said()
    for piece in pieces:
        said += reader.add(piece)
    said += reader.finish(was_cut=was_cut)
    assert reader.num_calls == len(said.calls)
    return said


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("", "", ()),
        ("no call \n", "no call \n", ()),
        (F_TEXT, "", (F,)),
        (f"Let me see.\n{F_TEXT}", "Let me see.", (F,)),
        (f"{F_TEXT}\n{G_TEXT}\n", "", (F, G)),
        (f"a {F_TEXT} b\n{G_TEXT} c\n", "a  b\n c", (F, G)),
        ("<tool_cal", "<tool_cal", ()),
        ("<<tool_call <tool_calls>", "<<tool_call <tool_calls>", ()),
        (f"<tool_<{F_TEXT}", "<tool_<", (F,)),
        ("<tool_call>{broken}</tool_call> more", "<tool_call>{broken}</tool_call> more", ()),
        ("<tool_call></tool_call>", "<tool_call></tool_call>", ()),
        (f"<tool_call>[]</tool_call>{G_TEXT}", "<tool_call>[]</tool_call>", (G,)),
        ("<tool_call>3</tool_call>", "<tool_call>3</tool_call>", ()),
        ('<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', ()),
        ('<tool_call>{"name": ["f"]}</tool_call>', '<tool_call>{"name": ["f"]}</tool_call>', ()),
        ('<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', "", (G,)),
        (
            '<tool_call>{"name": "g", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "g", "arguments": [1]}</tool_call>',
            (),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
            '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
            (),
        ),
        # The end marker within a text of JSON does not end the call, unless that text is broken.
        (
            '<tool_call>{"name": "f", "arguments": {"x": "\\"</tool_call>"}}</tool_call>',
            "",
            (ToolCall("f", '{"x": "\\"</tool_call>"}'),),
        ),
        (
            f'<tool_call>{{"name": "f\n</tool_call>{F_TEXT}',
            '<tool_call>{"name": "f\n</tool_call>',
            (F,),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"x": "é\\ud800"}}</tool_call>',
            "",
            (ToolCall("f", '{"x": "\\u00e9\\ud800"}'),),
        ),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}', "", (F,)),
    ],
)
def test_calls_are_taken_out_and_all_else_is_text(
    text: str, said: str, calls: tuple[ToolCall, ...]
) -> None:
    assert read(text) == Said(said, calls)
    assert read(*text) == Said(said, calls)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('[TOOL_CALLS]f[ARGS]{"x": 1}', "", (F,)),
        ('Well [TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}', "Well", (F, G)),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]', "", (F, G)),
        ('[TOOL_CALLS]f[ARGS]{"x"[TOOL_CALLS]g[ARGS]{}', '[TOOL_CALLS]f[ARGS]{"x"', (G,)),
        ("[TOOL_CALLS]f[TOOL_CA", "[TOOL_CALLS]f[TOOL_CA", ()),
        (
            '[TOOL_CALLS]f[ARGS]{"x": "[TOOL_CALLS]"}',
            "",
            (ToolCall("f", '{"x": "[TOOL_CALLS]"}'),),
        ),
    ],
)
def test_without_an_end_marker_a_call_ends_where_the_next_begins(
    text: str, said: str, calls: tuple[ToolCall, ...]
) -> None:
    assert read(text, form=MISTRAL) == Said(said, calls)
    assert read(*text, form=MISTRAL) == Said(said, calls)


def test_other_forms_are_read_as_their_parsers_do() -> None:
    coder = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
    glm = "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    lists = "<|tool_call_start|>[f(x=1), g()]<|tool_call_end|>"
    kimi = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"x": 1}<|tool_call_end|><|tool_calls_section_end|>'
    )
    assert read(coder, form=CODER).calls == (ToolCall("f", '{"x": "1"}'),)
    assert read(glm, form=form_of(glm47)).calls == (F,)
    assert read(lists, form=form_of(pythonic)).calls == (F, G)
    assert read(kimi, form=form_of(kimi_k2)).calls == (F,)


def test_a_call_that_was_cut_off_is_text_unless_it_is_json_and_complete() -> None:
    cut = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>"
    assert read(cut, form=CODER, was_cut=True) == Said(cut)
    assert read(cut, form=CODER).calls
    assert read(F_TEXT[:-5], was_cut=True) == Said(F_TEXT[:-5])
    assert read(F_TEXT[:-12], was_cut=True) == Said("", (F,))


def test_no_piece_of_a_marker_is_ever_text_of_a_call() -> None:
    reader = reader_of()
    told = [reader.add(character) for character in f"Hello. {F_TEXT}"]
    assert "".join(said.text for said in told) == "Hello."
    assert [said.calls for said in told if said.calls] == [(F,)]
    assert told[-1].calls == (F,)


def test_one_call_where_only_one_is_wanted() -> None:
    assert read(F_TEXT + G_TEXT, parallel_tool_calls=False) == Said("", (F,))
    both = '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]'
    assert read(both, form=MISTRAL, parallel_tool_calls=False) == Said("", (F,))


def test_what_a_parser_cannot_take_is_text() -> None:
    errors = [ValueError("no"), AttributeError(), RecursionError(), MemoryError(), KeyError(1)]

    def refuse(text: str, tools: list[Mapping[str, Any]]) -> Any:
        raise errors.pop()

    while errors:
        assert read("<a>x</a>", form=ToolForm("<a>", "</a>", refuse)) == Said("<a>x</a>")
    deep = f"<tool_call>{'[' * 50_000}</tool_call>"
    assert read(deep) == Said(deep)


def test_a_call_is_not_read_when_it_is_too_long_or_made_to_be_slow() -> None:
    def never(text: str, tools: list[Mapping[str, Any]]) -> Any:
        raise AssertionError(text)

    long = f"<a>{'x' * MAX_CALL_CHARACTERS}</a>"
    assert read(long, form=ToolForm("<a>", "</a>", never)) == Said(long)
    for parser, limits in MAX_OCCURRENCES.items():
        for text, most in limits.items():
            slow = f"<a>{text * (most + 1)}</a>"
            assert read(slow, form=ToolForm("<a>", "</a>", never, parser)) == Said(slow)


WORDS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[TOOL", "f[ARGS]", "{}", "<"),
        *(F_TEXT, G_TEXT, " ", "\n", "word", '"', "\\", '{"name": "g"}', "é"),
    ]
)


@given(
    st.lists(WORDS, max_size=12).map("".join),
    st.lists(st.integers(0, 60), max_size=8),
    st.sampled_from([JSON_TOOLS, MISTRAL]),
    st.booleans(),
    st.booleans(),
)
def test_pieces_make_no_difference(
    text: str, cuts: list[int], form: ToolForm, was_cut: bool, is_parallel: bool
) -> None:
    ends = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(ends)]
    how: dict[str, Any] = {"form": form, "was_cut": was_cut, "parallel_tool_calls": is_parallel}
    whole = read(text, **how)
    assert read(*pieces, **how) == whole
    if not whole.calls:
        assert whole.text == text
    for call in whole.calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.name in "fg"
    said = iter(text)
    assert all(character in said for character in whole.text)  # in its order, nothing added


def test_a_model_without_a_known_form_has_none() -> None:
    assert find_form(SimpleNamespace(has_tool_calling=False)) is None
