"""Adapters with chat templates and tokens of their own: whose is rendered, which token ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import tiny_models
from embedding_models import write_embedding_model
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import adapter_tokenizers
from mlops.engine.tokenization import check_adapter_tokenizer, load_tokenizer
from mlops.errors import InvalidRequestError, PackagingError
from mlops.serving.bentoml.packager import package_model
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.runner import MLXModelRunner
from tokenizer_folders import NUM_ROWS, read, write, write_templates, write_tokenizer
from tool_models import CALLS, CHATML, function

ASKED = [{"role": "user", "content": "Hi"}]
TIMEOUT_S = 60.0
CHATML_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_START, IM_END = 259, 260
TOKENS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more rows than its tokenizer has tokens, as most have."""
    return tiny_models.write_language_model(
        tmp_path_factory.mktemp("models") / "base", vocab=NUM_ROWS
    )


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as mlx-lm saves it: without a tokenizer."""
    return tiny_models.write_lora_adapter(tmp_path_factory.mktemp("adapters") / "plain", base)


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may add files to."""
    return shutil.copytree(plain, tmp_path / "adapter")


def with_chatml(folder: Path) -> Path:
    """Add what TRL saves after `setup_chat_format`."""
    return write_tokenizer(folder, templates=CHATML_TURNS, added=TOKENS, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def runner(base: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    chatml = with_chatml(shutil.copytree(plain, tmp_path_factory.mktemp("adapters") / "chatml"))
    one = MLXModelRunner(base, adapters={"plain": plain, "chatml": chatml})
    one.load_model()
    yield one
    one.unload_model()


@pytest.fixture
def added(runner: MLXModelRunner, adapter: Path) -> Iterator[str]:
    """The name that a test may add `adapter` under."""
    yield "added"
    if "added" in runner.adapter_names:
        runner.remove_adapter("added")


def prompt_of(runner: MLXModelRunner, adapter: str | None, **fields: Any) -> str:
    """What the model is given for a conversation."""
    loaded = runner._engine.loaded_for(adapter)
    request = engine.parse_request({"messages": ASKED, "max_tokens": 1, **fields})
    made = engine.to_generation_request(loaded, request, adapter=adapter)
    return str(loaded.tokenizer.decode(list(made.prompt)))


BASES = "<|start|>user\nHi<|end|>\n<|start|>assistant\n"


def test_each_request_is_written_with_the_template_of_its_adapter(runner: MLXModelRunner) -> None:
    chatml = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for adapter, expected in [("chatml", chatml), (None, BASES), ("plain", BASES)] * 2:
        assert prompt_of(runner, adapter) == expected
    # Bytes are tokens: its markers are tokens of their own, and spelled out for the base.
    counts = {
        adapter: runner.predict({"messages": ASKED, "max_tokens": 1, "adapter": adapter})["usage"]
        for adapter in ("chatml", "base", "plain")
    }
    assert counts["chatml"]["prompt_tokens"] == 3 + len("user\nHi\nassistant\n")
    assert counts["base"]["prompt_tokens"] == counts["plain"]["prompt_tokens"] == 21
    text = "<|im_end|>"
    for adapter, expected_tokens in (("chatml", 1), ("plain", len(text)), ("base", len(text))):
        asked = {"prompt": text, "max_tokens": 1, "adapter": adapter}
        assert runner.predict(asked)["usage"]["prompt_tokens"] == expected_tokens


def ask_for(runner: MLXModelRunner, token: int, adapter: str) -> dict[str, Any]:
    """What comes of a request whose answer is this token again and again."""
    asked = {"prompt": "Hi", "max_tokens": 3, "logit_bias": {str(token): 100}}
    return runner.predict({**asked, "adapter": adapter})


def test_an_answer_ends_at_the_end_tokens_of_its_adapter(runner: MLXModelRunner) -> None:
    for adapter, reason in (("chatml", "stop"), ("base", "length"), ("plain", "length")):
        said = ask_for(runner, IM_END, adapter)
        assert (said["finish_reason"], said["prediction"]) == (reason, "")
    # The base's config.json still counts.
    assert {ask_for(runner, 258, one)["finish_reason"] for one in ("chatml", "base")} == {"stop"}


def test_added_tokens_are_text_in_the_answers_of_their_adapter(runner: MLXModelRunner) -> None:
    assert ask_for(runner, IM_START, "chatml")["prediction"] == "<|im_start|>" * 3
    assert ask_for(runner, IM_START, "base")["prediction"] == ""
    assert runner.token_bytes([IM_START], "chatml") == [b"<|im_start|>"]
    assert runner.token_bytes([IM_START]) == runner.token_bytes([IM_START], "base") == [b""]
    assert runner.token_bytes([104], "gone") == runner.token_bytes([104])


def test_the_prefix_cache_gives_no_request_what_another_adapter_computed(
    runner: MLXModelRunner,
) -> None:
    asked = {"prompt": "The same beginning of forty characters..", "max_tokens": 4}
    for adapter in ("chatml", "plain", "base"):
        assert runner.predict({**asked, "adapter": adapter})["usage"]["cached_tokens"] == 0
    for adapter in ("chatml", "plain", "base"):
        assert runner.predict({**asked, "adapter": adapter})["usage"]["cached_tokens"] > 0


def test_an_adapter_without_a_tokenizer_or_with_the_bases_shares_the_bases(
    runner: MLXModelRunner, base: Path, adapter: Path, added: str
) -> None:
    running = runner._engine
    assert running.loaded_for("plain") is running.loaded
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    runner.add_adapter(added, adapter)
    assert running.loaded_for(added) is running.loaded


def test_adapters_with_the_same_files_share_a_tokenizer(
    runner: MLXModelRunner, adapter: Path, added: str
) -> None:
    runner.add_adapter(added, with_chatml(adapter))
    running = runner._engine
    assert running.loaded_for(added) is running.loaded_for("chatml")


TEMPLATE = "{% for m in messages %}own {{ m.content }}{% endfor %}"


@pytest.mark.parametrize("layout", ["config", "files", "processor"])
def test_a_template_alone_is_used_with_the_bases_tokens(
    runner: MLXModelRunner, adapter: Path, added: str, layout: str
) -> None:
    write_templates(adapter, TEMPLATE, layout)
    runner.add_adapter(added, adapter)
    assert prompt_of(runner, added) == "own Hi"
    assert prompt_of(runner, None) == BASES
    loaded = runner._engine.loaded_for(added)
    assert loaded.tokenizer.eos_token_ids == {258}
    assert loaded.tokenizer.get_vocab() == runner.model.tokenizer.get_vocab()


def test_a_template_of_the_base_does_not_stand_over_the_adapters(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    write_templates(other, {"default": "the base's", "tool_use": "the base's"}, "files")
    write_templates(adapter, TEMPLATE)
    one = MLXModelRunner(other, adapters={"own": adapter})
    one.load_model()
    assert prompt_of(one, "own") == "own Hi"
    assert prompt_of(one, None) == "the base's"
    one.unload_model()


def test_a_tokenizer_without_a_template_has_the_bases(
    runner: MLXModelRunner, adapter: Path, added: str
) -> None:
    runner.add_adapter(added, write_tokenizer(adapter, templates=None, added=("<a>",)))
    assert prompt_of(runner, added) == BASES


def test_an_adapter_brings_the_template_that_its_base_lacks(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(base, tmp_path / "bare")
    config = read(bare / "tokenizer_config.json")
    del config["chat_template"]
    write(bare / "tokenizer_config.json", config)
    one = MLXModelRunner(bare, adapters={"chatml": with_chatml(adapter)})
    one.load_model()
    asked = {"messages": ASKED, "max_tokens": 1}
    with pytest.raises(InvalidRequestError, match="no chat template for messages"):
        one.predict(asked)
    assert one.predict({**asked, "adapter": "chatml"})["usage"]["prompt_tokens"] == 21
    one.unload_model()


def test_an_adapters_generation_config_ends_its_answers(
    runner: MLXModelRunner, adapter: Path, added: str
) -> None:
    write(adapter / "generation_config.json", {"eos_token_id": [258, 65]})
    runner.add_adapter(added, adapter)
    assert ask_for(runner, 65, added)["finish_reason"] == "stop"
    assert ask_for(runner, 65, "base")["finish_reason"] == "length"


def test_a_replaced_adapter_brings_its_template(
    runner: MLXModelRunner, plain: Path, tmp_path: Path, added: str
) -> None:
    for text in ("first", "second"):
        folder = shutil.copytree(plain, tmp_path / text)
        write_templates(folder, text, "files")
        runner.add_adapter(added, folder, replace=True)
        assert prompt_of(runner, added) == text
    runner.add_adapter(added, plain, replace=True)
    assert prompt_of(runner, added) == BASES


def test_a_request_is_answered_by_the_adapter_that_its_prompt_was_made_for(
    runner: MLXModelRunner, adapter: Path, plain: Path, added: str
) -> None:
    running = runner._engine
    runner.add_adapter(added, with_chatml(adapter))
    first = running.adapters.find(added)
    fields = {"max_tokens": 3, "n": 2, "adapter": added, "logit_bias": {str(IM_END): 100}}
    asked = runner._tokenize(running, {"messages": ASKED, **fields}, None)
    runner.add_adapter(added, plain, replace=True)
    with asked.held:
        prepared = runner._submit(running, asked)
        runner.remove_adapter(added)
    results = [one.result(TIMEOUT_S) for one in prepared.generations]
    # `plain` has no such end token.
    assert [one.finish_reason for one in results] == ["stop", "stop"]
    assert first.num_users == 0
    running.adapters.check()


def test_what_cannot_be_answered_holds_no_adapter(runner: MLXModelRunner) -> None:
    chatml = runner._engine.adapters.find("chatml")
    for wrong in ({"max_tokens": 10**6}, {"tools": [function("now")], "max_tokens": 1}):
        with pytest.raises(InvalidRequestError):
            runner.predict({"messages": ASKED, "adapter": "chatml", **wrong})
        assert chatml.num_users == 0
    for future in (runner.embed("Hi", adapter="chatml"), runner.embed("Hi", adapter="nobody")):
        assert future.exception(TIMEOUT_S) is not None
    assert chatml.num_users == 0


def test_of_many_tokenizers_few_are_kept(
    runner: MLXModelRunner, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_tokenizers, "MAX_KEPT", 2)
    names = [f"one{number}" for number in range(4)]
    for name in names:
        folder = shutil.copytree(plain, tmp_path / name)
        write_templates(folder, f"template of {name}", "files")
        runner.add_adapter(name, folder)
    running = runner._engine
    assert [running.has_tokenizer(name) for name in names] == [False, False, True, True]
    for name in names:
        assert prompt_of(runner, name) == f"template of {name}"
        runner.predict({"messages": ASKED, "max_tokens": 1, "adapter": name})
    assert [running.has_tokenizer(name) for name in names] == [False, False, True, True]
    for name in names:
        runner.remove_adapter(name)


def other_ids(folder: Path) -> None:
    write_tokenizer(folder)
    tokenizer = read(folder / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    write(folder / "tokenizer.json", tokenizer)


def rename_start(folder: Path, name: str = "<|begin|>", **settings: Any) -> None:
    write_tokenizer(folder, **settings)
    text = (folder / "tokenizer.json").read_text().replace("<|start|>", name)
    (folder / "tokenizer.json").write_text(text)


def renamed_token_in_the_template(folder: Path) -> None:
    rename_start(folder)


def renamed_token_in_the_bases_template(folder: Path) -> None:
    rename_start(folder, templates=None)


def swapped_tokens(folder: Path) -> None:
    rename_start(folder, "<|pad>", templates=TEMPLATE)
    text = (folder / "tokenizer.json").read_text()
    text = text.replace("<|pad|>", "<|start|>").replace("<|pad>", "<|pad|>")
    (folder / "tokenizer.json").write_text(text)


def renamed_letter(folder: Path) -> None:
    write_tokenizer(folder, templates=TEMPLATE)
    tokenizer = read(folder / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ab"] = vocabulary.pop("a")
    write(folder / "tokenizer.json", tokenizer)


def test_an_added_token_may_have_another_name_and_its_old_id(
    runner: MLXModelRunner, base: Path, adapter: Path, added: str
) -> None:
    template = "{% for m in messages %}<|begin|>{{ m.content }}{% endfor %}"
    rename_start(adapter, templates=template)
    model = recognise(base)
    own = load_tokenizer(model).tokenizer
    (warning,) = check_adapter_tokenizer(recognise(adapter), model, own)
    assert warning.endswith("other names for added tokens of the base: <|begin|> for <|start|>")
    runner.add_adapter(added, adapter)
    asked = {"messages": ASKED, "max_tokens": 2, "logit_bias": {"257": 100}}
    said = runner.predict({**asked, "adapter": added})
    assert said["usage"]["prompt_tokens"] == 1 + len("Hi")
    assert runner.token_bytes([257], added) == [b"<|begin|>"]
    assert runner.token_bytes([257]) == [b"<|start|>"]
    # The prompt is that of the base's own name.
    prompts = [
        engine.to_generation_request(
            runner._engine.loaded_for(name),
            engine.parse_request({"prompt": f"{token}Hi", "max_tokens": 1}),
            adapter=name,
        ).prompt
        for name, token in ((added, "<|begin|>"), (None, "<|start|>"))
    ]
    assert prompts[0] == prompts[1] == (257, *prompts[1][1:])


def too_many_tokens(folder: Path) -> None:
    write_tokenizer(folder, added=tuple(f"<{number}>" for number in range(NUM_ROWS - 259 + 1)))


def damaged(folder: Path) -> None:
    write_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")


def damaged_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[")


def no_template(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": 5})


def no_json(folder: Path) -> None:
    (folder / "chat_template.json").write_text("{")


WRONG = {
    other_ids: "another tokenizer than its base model: 2 of 259 tokens have another id or none",
    renamed_token_in_the_template: r"template of its requests has the old ones \(<\|start\|>\)",
    renamed_token_in_the_bases_template: r"has the old ones \(<\|start\|>\)",
    swapped_tokens: "2 of 259 tokens have another id or none",
    renamed_letter: r"1 of 259 tokens have another id or none \(a\)",
    too_many_tokens: r"has no rows for \(<61>; the embedding has 320\)",
    damaged: "the tokenizer of .*adapter cannot be loaded",
    damaged_settings: "tokenizer_config.json is not valid JSON",
    no_template: "the chat template of .*adapter is no text",
    no_json: "chat_template.json is not valid JSON",
}


@pytest.mark.parametrize("spoil", WRONG)
def test_what_cannot_be_used_is_refused_by_name(
    runner: MLXModelRunner, base: Path, adapter: Path, added: str, spoil: Any
) -> None:
    spoil(adapter)
    with pytest.raises(PackagingError, match=WRONG[spoil]) as caught:
        runner.add_adapter(added, adapter)
    assert json.dumps(caught.value.details)
    assert added not in runner.adapter_names
    with pytest.raises(PackagingError, match=WRONG[spoil]):
        MLXModelRunner(base, adapters={"own": adapter}).load_model()


@pytest.mark.parametrize("spoil", WRONG)
def test_packaging_refuses_it_in_the_same_words(
    base: Path, adapter: Path, spoil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    spoil(adapter)
    with pytest.raises(PackagingError, match=WRONG[spoil]):
        package_model(adapter, "spoiled", base_model=base, build_bento=False)


def test_a_stored_adapter_is_served_with_its_template(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    write_templates(with_chatml(adapter), {"default": TEMPLATE, "tool_use": "t"}, "files")
    stored = package_model(adapter, "stored", base_model=base, build_bento=False)
    one = MLXModelRunner(stored["model_tag"])
    one.load_model()
    assert prompt_of(one, one.default_adapter) == "own Hi"
    assert one.predict({"messages": ASKED, "max_tokens": 1})["usage"]["prompt_tokens"] == 6
    assert IM_END in one._engine.loaded_for(one.default_adapter).tokenizer.eos_token_ids
    one.unload_model()


def test_tools_are_offered_where_the_adapters_template_has_them(
    runner: MLXModelRunner, adapter: Path, added: str
) -> None:
    write_templates(adapter, CHATML.replace("__CALL__", CALLS["json_tools"]), "files")
    runner.add_adapter(added, adapter)
    asked = {"messages": ASKED, "tools": [function("now")], "tool_choice": "required"}
    asked |= {"max_tokens": 60}
    with pytest.raises(InvalidRequestError, match="tools cannot be used with this model"):
        runner.predict(asked)
    said = runner.predict({**asked, "adapter": added})
    assert [call["name"] for call in said["tool_calls"]] == ["now"]


def test_grammars_of_different_tokenizers_share_a_batch(runner: MLXModelRunner) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["<|im_end|>", "x"]}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    asked = {"messages": ASKED, "max_tokens": 60, "response_format": form}
    answers = runner.predict_batch(
        [{**asked, "adapter": one} for one in ("chatml", "base", "plain", "chatml")]
    )
    for answer in answers:
        assert not isinstance(answer, Exception)
        assert answer["finish_reason"] == "stop"
        assert json.loads(answer["prediction"])["a"] in ("<|im_end|>", "x")


def test_embeddings_are_tokenized_as_their_adapters(tmp_path: Path) -> None:
    base = write_embedding_model(tmp_path / "base", vocab=NUM_ROWS, is_headless=False)
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base, keys=["mlp.up_proj"])
    with_chatml(adapter)
    one = MLXModelRunner(base, adapters={"chatml": adapter})
    one.load_model()
    text = "<|im_end|>"
    counts = {
        name: one.embed(text, adapter=name).result(TIMEOUT_S).prompt_tokens
        for name in ("chatml", "base")
    }
    assert counts == {"chatml": 1, "base": len(text)}
    one.unload_model()


def test_a_running_service_takes_an_adapter_with_its_template(base: Path, adapter: Path) -> None:
    with_chatml(adapter)
    host = RunnerHost(lambda: MLXModelRunner(base))
    host.start()
    host._loading_ended.result(TIMEOUT_S)
    settings = HTTPSettings(enable_runtime_adapters=True, adapter_folder=adapter.parent)
    with TestClient(create_app(Served(host, ServiceInfo("tiny"), settings))) as client:
        asked = {"messages": ASKED, "max_tokens": 1, "logprobs": True}
        asked["logit_bias"] = {str(IM_START): 100}

        def chat(model: str) -> tuple[int, str]:
            said = client.post("/v1/chat/completions", json={**asked, "model": model}).json()
            (told,) = said["choices"][0]["logprobs"]["content"]
            return said["usage"]["prompt_tokens"], told["token"]

        assert chat("tiny") == (21, "")
        body = {"lora_name": "own", "lora_path": str(adapter)}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert chat("own") == (21, "<|im_start|>")
        assert chat("tiny") == (21, "")
        too_many_tokens(adapter)
        body = {"lora_name": "more", "lora_path": str(adapter)}
        refused = client.post("/v1/load_lora_adapter", json=body)
        assert refused.status_code == 400
        assert "its base model has no rows for" in refused.json()["error"]["message"]
    host.stop()


def test_an_adapters_broken_template_is_said_when_it_is_loaded(
    runner: MLXModelRunner, adapter: Path, added: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_templates(adapter, "{% for m in messages %}", "files")
    runner.add_adapter(added, adapter)
    assert "a plain conversation cannot be answered" in caplog.text
    asked = {"messages": ASKED, "max_tokens": 1}
    with pytest.raises(InvalidRequestError, match="chat template refuses messages"):
        runner.predict({**asked, "adapter": added})
    assert runner.predict({"prompt": "Hi", "max_tokens": 1, "adapter": added})["adapter"] == added
    assert runner.predict(asked)["adapter"] is None
