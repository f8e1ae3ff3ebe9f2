"""Tokenizers read from folders as people have them: templates, form of calls, end tokens."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models
import tokenizer_folders
from mlops.engine.chat_template import render
from mlops.engine.messages import parse_messages, parse_tools
from mlops.engine.tokenization import LoadedTokenizer, load_tokenizer
from mlops.engine.tools import ToolForm, find_form
from mlops.errors import InvalidRequestError, PackagingError
from tokenizer_folders import TEMPLATES, checkpoint_of, real_template, write_tokenizer
from tool_models import CALLS, CHATML, function

ASKED = parse_messages([{"role": "user", "content": "Hi"}])
TOOLS = parse_tools({"messages": ASKED, "tools": [function("now", description="the time")]})
PLAIN = "{% for m in messages %}plain {{ m.content }}{% endfor %}"
WITH_CALLS = CHATML.replace("__CALL__", CALLS["json_tools"])
LAYOUTS = ("config", "files")


def load(folder: Path, **config: Any) -> LoadedTokenizer:
    return load_tokenizer(checkpoint_of(folder, **config))


def transformers_says(tokenizer: Any, tools: Any = None) -> str:
    """Its text; `ERROR` where it refuses."""
    try:
        text = tokenizer._tokenizer.apply_chat_template(
            [dict(message) for message in ASKED],
            tools=None if tools is None else list(tools.functions),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=tokenizer.has_thinking,
        )
    except Exception:  # whatever a template raises
        return "ERROR"
    return str(text)


def we_say(tokenizer: Any, tools: Any = None) -> str:
    try:
        return render(tokenizer, ASKED, tools)
    except InvalidRequestError:
        return "ERROR"


def facts(form: ToolForm | None) -> tuple[str, str, str] | None:
    return form and (form.parser, form.start, form.end)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_functions_have_a_template_of_their_own(tmp_path: Path, layout: str) -> None:
    named = {"default": PLAIN, "tool_use": WITH_CALLS, "rag": "rag"}
    tokenizer = load(write_tokenizer(tmp_path, templates=named, layout=layout)).tokenizer
    assert render(tokenizer, ASKED) == "plain Hi"
    assert '"name": "now"' in render(tokenizer, ASKED, TOOLS)
    for tools in (None, TOOLS):
        assert render(tokenizer, ASKED, tools) == transformers_says(tokenizer, tools)
    assert facts(find_form(tokenizer)) == ("json_tools", "<tool_call>", "</tool_call>")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_one_the_default_decides_the_form_of_calls(tmp_path: Path, layout: str) -> None:
    named = {"default": WITH_CALLS, "rag": "[TOOL_CALLS]"}
    tokenizer = load(write_tokenizer(tmp_path, templates=named, layout=layout)).tokenizer
    assert facts(find_form(tokenizer)) == ("json_tools", "<tool_call>", "</tool_call>")
    assert render(tokenizer, ASKED, TOOLS) == transformers_says(tokenizer, TOOLS)


def test_the_form_that_the_settings_name_is_kept(tmp_path: Path) -> None:
    named = {"default": PLAIN, "tool_use": WITH_CALLS}
    folder = write_tokenizer(tmp_path, templates=named, tool_parser_type="mistral")
    assert facts(find_form(load(folder).tokenizer)) == ("mistral", "[TOOL_CALLS]", "")


def test_no_default_is_said_when_loading_and_when_asked(tmp_path: Path) -> None:
    loaded = load(write_tokenizer(tmp_path, templates={"tool_use": WITH_CALLS}))
    assert len(loaded.warnings) == 1
    assert "only others (tool_use): offer functions, or send text" in loaded.warnings[0]
    with pytest.raises(InvalidRequestError, match="no chat template for messages"):
        render(loaded.tokenizer, ASKED)
    assert render(loaded.tokenizer, ASKED, TOOLS).endswith("<|start|>assistant\n")


@pytest.mark.parametrize("others", [None, PLAIN])
def test_a_processors_template_is_used_where_there_is_no_other(
    tmp_path: Path, others: str | None
) -> None:
    folder = write_tokenizer(tmp_path, templates=others)
    tokenizer_folders.write_templates(folder, WITH_CALLS, "processor")
    tokenizer = load(folder).tokenizer
    assert render(tokenizer, ASKED).startswith("<|start|>user" if others is None else "plain")
    assert (find_form(tokenizer) is not None) is (others is None)


@pytest.mark.skipif(not TEMPLATES.exists(), reason=tokenizer_folders.SKIPPED)
@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_real_templates_say_what_transformers_says(tmp_path: Path, name: str) -> None:
    template = real_template(name)
    alone = load(write_tokenizer(tmp_path / "alone", templates=template)).tokenizer
    named = {"default": PLAIN, "tool_use": template}
    beside = load(write_tokenizer(tmp_path / "beside", templates=named, layout="files")).tokenizer
    for tools in (None, TOOLS):
        assert we_say(alone, tools) == transformers_says(alone, tools)
    assert we_say(beside) == "plain Hi"
    assert we_say(beside, TOOLS) == transformers_says(alone, TOOLS)
    # What mlx-lm infers from it, when it is the only one.
    assert facts(find_form(beside)) == facts(find_form(alone))


def test_the_role_developer_is_kept_for_a_template_that_knows_it(tmp_path: Path) -> None:
    from mlops.engine.prompts import _render
    from mlops.engine.request import parse_request

    named = {
        "default": "{{ messages[0].role }}",
        "tool_use": "{% if messages[0].role == 'developer' %}yes{% endif %}",
    }
    tokenizer = load(write_tokenizer(tmp_path, templates=named)).tokenizer
    asked = {"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]}
    assert _render(tokenizer, parse_request(asked)) == "system"
    tools = {"tools": [function("now")]}
    assert _render(tokenizer, parse_request(asked | tools)) == "yes"


BROKEN = {
    "syntax": ("{% for m in messages %}", "Unexpected end of template"),
    "filter": ("{{ messages | nonsense }}", "No filter named 'nonsense'"),
    "raises": ("{{ raise_exception('never') }}", "never"),
    "undefined": ("{{ nothing.at.all }}", "undefined"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_work_is_said_when_loading(tmp_path: Path, name: str) -> None:
    template, said = BROKEN[name]
    loaded = load(write_tokenizer(tmp_path / "one", templates=template))
    assert len(loaded.warnings) == 1
    assert loaded.warnings[0].startswith(f"{tmp_path / 'one'}: a plain conversation cannot be")
    assert said in loaded.warnings[0]
    named = {"default": PLAIN, "tool_use": template}
    loaded = load(write_tokenizer(tmp_path / "named", templates=named))
    assert [said in one for one in loaded.warnings] == [True]
    assert "functions cannot be offered" in loaded.warnings[0]


@pytest.mark.parametrize("template", [5, {"default": 5}, {"default": PLAIN, "tool_use": ["x"]}])
def test_a_template_that_is_no_text_is_refused(tmp_path: Path, template: Any) -> None:
    folder = write_tokenizer(tmp_path, templates=template)
    with pytest.raises(PackagingError, match=f"chat template of {folder} is no text"):
        load(folder)


def end_tokens(folder: Path, generation: Any = None, **config: Any) -> set[int]:
    if generation is not None:
        tokenizer_folders.write(folder / "generation_config.json", generation)
    return set(load(folder, **config).tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, {258}),
        ({"eos_token_id": 256}, None, {256, 258}),
        ({"eos_token_id": 256}, {"eos_token_id": 257}, {256, 257, 258}),
        ({"eos_token_id": [256, 300]}, {"eos_token_id": [257]}, {256, 257, 258, 300}),
        ({"text_config": {"eos_token_id": 0, "vocab_size": 320}}, None, {0, 258}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {258}),
    ],
)
def test_all_end_tokens_count(
    tmp_path: Path, config: dict[str, Any], generation: Any, expected: set[int]
) -> None:
    assert end_tokens(write_tokenizer(tmp_path), generation, **config) == expected


WRONG = {
    "text": ("258", "'258', which is no token id", ()),
    "truth": ([256, True], "True, which is no token id", (256,)),
    "negative": (-1, "-1, which is no token id", ()),
    "fraction": (2.0, "2.0, which is no token id", ()),
    "object": ({"a": 1}, "{'a': 1}, which is no token id", ()),
    "nested": ([[256]], "[256], which is no token id", ()),
    "beyond": ([256, 320], "the end tokens 320 are none of the model's 320 tokens", (256,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_an_end_token_is_said(tmp_path: Path, name: str) -> None:
    value, said, used = WRONG[name]
    folder = write_tokenizer(tmp_path)
    tokenizer_folders.write(folder / "generation_config.json", {"eos_token_id": value})
    loaded = load(folder)
    assert said in loaded.warnings[0]
    assert loaded.tokenizer.eos_token_ids == {258, *used}


@pytest.mark.parametrize("name", WRONG)
def test_in_config_json_it_is_said_or_refused(tmp_path: Path, name: str) -> None:
    value, said, used = WRONG[name]
    folder = write_tokenizer(tmp_path)
    try:
        loaded = load(folder, eos_token_id=value)
    except PackagingError as exc:  # transformers reads config.json with the tokenizer
        assert "Validation error for field 'eos_token_id'" in str(exc)
        assert name not in ("negative", "beyond")
    else:
        assert said in loaded.warnings[0]
        assert loaded.tokenizer.eos_token_ids == {258, *used}


def test_a_damaged_generation_config_is_said(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json is not valid JSON" in load(folder).warnings[0]


def test_a_model_without_an_end_is_said(tmp_path: Path) -> None:
    loaded = load(write_tokenizer(tmp_path, templates=None, eos_token=None))
    assert loaded.tokenizer.eos_token_ids == set()
    assert "each goes on until max_tokens" in loaded.warnings[0]


TURN_ENDS = {
    # What ends an answer in the template; what fine-tunes often still call their end.
    "Qwen-Qwen2.5-7B-Instruct": ("<|im_end|>", "<|endoftext|>"),
    "Qwen-Qwen3-0.6B": ("<|im_end|>", "<|endoftext|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|eot_id|>", "<|end_of_text|>"),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|eot_id|>", "<|end_of_text|>"),
    "google-gemma-2-2b-it": ("<end_of_turn>", "<eos>"),
    "microsoft-Phi-3.5-mini-instruct": ("<|end|>", "<|endoftext|>"),
    "moonshotai-Kimi-K2": ("<|im_end|>", "[EOS]"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|END_OF_TURN_TOKEN|>", None),
    "mistralai-Mistral-Nemo-Instruct-2407": ("</s>", None),
    "deepseek-ai-DeepSeek-V3.1": ("<｜end▁of▁sentence｜>", None),
    "ibm-granite-granite-3.3-2B-Instruct": ("<|end_of_text|>", None),
    "openai-gpt-oss-120b": ("<|return|>", None),
    "ByteDance-Seed-OSS": ("<seed:eos>", None),
}


@pytest.mark.parametrize("name", TURN_ENDS)
def test_what_a_template_ends_an_answer_with_is_an_end_token(tmp_path: Path, name: str) -> None:
    template, (right, other) = real_template(name), TURN_ENDS[name]
    named = {right, other or right, "<|END_RESPONSE|>", "<|user|>", "<|channel|>", "<|message|>"}
    added = tuple(sorted(named - {*tiny_models.SPECIAL_TOKENS}))

    def ends_with(eos: str) -> tuple[set[str], tuple[str, ...]]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        how = {"templates": template, "added": added, "eos_token": eos, "bos_token": "<|start|>"}
        loaded = load(write_tokenizer(folder, **how))  # type: ignore[arg-type]
        ids = loaded.tokenizer.eos_token_ids
        return set(loaded.tokenizer.convert_ids_to_tokens(sorted(ids))), loaded.warnings

    ends, warnings = ends_with(right)
    assert ends == {right}, warnings
    if other is not None:
        ends, warnings = ends_with(other)
        assert ends == {right, other}
        assert any(f"ends an answer with {right}" in one for one in warnings)


def test_a_turn_end_that_is_no_token_of_its_own_is_left_alone(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    loaded = load(write_tokenizer(tmp_path, templates=template))
    assert loaded.tokenizer.eos_token_ids == {258}


def test_an_added_token_whose_id_would_not_be_kept_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    tokenizer_folders.add_tokens(folder, ("<far>",), first=300)
    with pytest.raises(PackagingError, match=r"'<far>' with the id 300, which is read as 259"):
        load(folder)


def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"hello there {number} a b c d" for number in range(300)),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def without_tokenizer_json(folder: Path, **settings: Any) -> Path:
    write_tokenizer(folder, **settings)
    (folder / "tokenizer.json").unlink()
    return folder


def test_sentencepiece_alone_is_read_by_the_class_that_is_named(tmp_path: Path) -> None:
    import sentencepiece

    folder = without_tokenizer_json(
        tmp_path, tokenizer_class="LlamaTokenizer", eos_token="</s>", pad_token=None
    )
    (folder / "tokenizer.model").write_bytes(model := sentencepiece_model())
    loaded = load(folder)
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    encoded = loaded.tokenizer.encode("hello there", add_special_tokens=False)
    assert encoded == own.encode("hello there")
    assert loaded.tokenizer.eos_token_ids == {own.eos_id()}
    assert loaded.tokenizer.decode(encoded) == "hello there"


def test_sentencepiece_without_a_class_is_refused(tmp_path: Path) -> None:
    folder = without_tokenizer_json(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(PackagingError, match=r"has no tokenizer.json.*save the tokenizer again"):
        load(folder)


def test_tiktoken_says_what_to_install(tmp_path: Path) -> None:
    folder = without_tokenizer_json(tmp_path)
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tokenizer.model").write_text("\n".join(lines))
    with pytest.raises(PackagingError, match=r"pip install tiktoken"):
        load(folder)


def test_vocabulary_and_merges_are_read(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, tokenizer_class="GPT2Tokenizer", pad_token=None)
    model = tokenizer_folders.read(folder / "tokenizer.json")["model"]
    (folder / "tokenizer.json").unlink()
    tokenizer_folders.write(folder / "vocab.json", model["vocab"] | {"<|end|>": 256})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = load(folder).tokenizer
    assert tokenizer.encode("hé") == [model["vocab"][one] for one in ("h", "Ã", "©")]
    assert tokenizer.eos_token_ids == {256}


DAMAGED = {
    "no JSON": ("tokenizer.json", "{", "Failed to parse tokenizer.json"),
    "nothing in it": ("tokenizer.json", "{}", "cannot be loaded: KeyError"),
    "a pointer": ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "parse"),
    "no settings": ("tokenizer_config.json", "[", "cannot be loaded"),
    "no text": ("chat_template.jinja", b"\xff\xfe", "cannot be loaded: UnicodeDecodeError"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_is_refused_by_the_name_of_its_folder(
    tmp_path: Path, name: str
) -> None:
    file, content, said = DAMAGED[name]
    folder = write_tokenizer(tmp_path)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PackagingError, match=f"the tokenizer of {folder} cannot") as caught:
        load(folder)
    assert said in str(caught.value)
    assert json.dumps(caught.value.details)
