"""Packaging real (tiny, random) checkpoints into a real BentoML store."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import bentoml
import pytest

from mlops.errors import BentoMLError, ConfigError, IntegrityError, PackagingError
from mlops.registry import ModelStore, resolve, verify
from mlops.serving.bentoml.config import BentoMLConfig, ModelFramework
from mlops.serving.bentoml.packager import ModelPackager, PackageConfig, package_model
from tiny_models import write_language_model, write_lora_adapter, write_peft_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    write_language_model(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    folder = base.parent / "adapter"
    write_lora_adapter(folder, base, base_reference=str(base))
    return folder


def test_full_model(bentoml_home: Path, base: Path) -> None:
    result = package_model(base, "My Model", "support", model_version="1.2.3+Build.5")
    assert result["success"] is True
    assert result["model_tag"] == "my-model:1.2.3-build.5"
    assert result["renamed"] == {"My Model": "my-model", "1.2.3+Build.5": "1.2.3-build.5"}
    stored = bentoml.models.get(result["model_tag"])
    assert stored.info.labels == {"project": "support"}
    assert (Path(stored.path) / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    verify(resolve(result["model_tag"], digest=result["model_digest"]))


def test_what_changed_in_a_name_is_logged(
    bentoml_home: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        package_model(base, "My Model", build_bento=False)
    assert "'My Model' is no part of a tag; stored as 'my-model'" in caplog.text


def test_bento_holds_what_it_needs_and_no_weights(bentoml_home: Path, base: Path) -> None:
    result = package_model(base, "demo", model_version="1.0.0", description="For the docs.")
    bento = bentoml.bentos.get(result["bento_tag"])
    folder = Path(bento.path)
    service = (folder / "src" / "service.py").read_text()
    assert "'demo:1.0.0'" in service
    assert f"digest='{result['model_digest']}'" in service
    assert len(service.splitlines()) < 20
    pins = (folder / "env" / "python" / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("bentoml==") for line in pins)
    assert any(line.startswith("mlx[cpu]==") for line in pins)
    assert all("==" in line for line in pins if line)
    (wheel,) = (folder / "env" / "python" / "wheels").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert "mlops/serving/bentoml/service.py" in names
    assert not any("base_model" in name for name in names)
    assert [str(model.tag) for model in bento.info.all_models] == ["demo:1.0.0"]
    assert not list(folder.rglob("*.safetensors"))
    assert bento.doc == "For the docs."


def test_packaging_again_writes_nothing(bentoml_home: Path, base: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        files = [path for path in bentoml_home.rglob("*") if path.is_file() and path.name != "lock"]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    first = package_model(base, "demo")
    before = state()
    again = package_model(base, "demo")
    assert first["unchanged"] is False
    assert again["unchanged"] is True
    assert {**again, "unchanged": False} == first
    assert state() == before


def test_other_content_under_a_taken_tag(bentoml_home: Path, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_language_model(other, seed=7)
    package_model(base, "demo", model_version="1.0.0")
    with pytest.raises(PackagingError, match="demo:1.0.0 is taken by other content"):
        package_model(other, "demo", model_version="1.0.0")


def test_same_model_with_other_settings_is_another_bento(bentoml_home: Path, base: Path) -> None:
    one = package_model(base, "demo")
    two = package_model(base, "demo", service=BentoMLConfig(max_batch_size=4))
    assert one["model_tag"] == two["model_tag"]
    assert one["bento_tag"] != two["bento_tag"]


def test_adapter_and_its_base_are_two_entries_and_the_base_is_shared(
    bentoml_home: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "peft"
    write_peft_adapter(other, base, seed=5)
    one = package_model(adapter, "tone", "support", model_framework=ModelFramework.MLX)
    two = package_model(other, "style", "sales", base_model=base)
    assert one["base_model_tag"] == two["base_model_tag"]
    assert len(ModelStore().list()) == 3
    bento = bentoml.bentos.get(one["bento_tag"])
    assert {str(model.tag) for model in bento.info.all_models} == {
        one["model_tag"],
        one["base_model_tag"],
    }
    resolved = resolve(one["model_tag"])
    assert resolved.base is not None
    assert resolved.base.tag == one["base_model_tag"]


def test_base_that_was_packaged_before_is_found_by_its_content(
    bentoml_home: Path, base: Path, adapter: Path
) -> None:
    packaged = package_model(base, "official-base", model_version="1.0.0")
    result = package_model(adapter, "tone")
    assert result["base_model_tag"] == packaged["model_tag"]


def test_base_with_its_adapters_in_one_bento(bentoml_home: Path, base: Path, adapter: Path) -> None:
    result = package_model(base, "demo", adapters={"tone": adapter})
    assert set(result["adapter_tags"]) == {"tone"}
    bento = bentoml.bentos.get(result["bento_tag"])
    assert len(bento.info.all_models) == 2
    entry = ModelStore().get(result["adapter_tags"]["tone"])
    assert entry.manifest.base_tag == result["model_tag"]


def test_flipped_byte_is_found_in_the_base_of_an_adapter(bentoml_home: Path, adapter: Path) -> None:
    result = package_model(adapter, "tone", build_bento=False)
    weights = ModelStore().get(result["base_model_tag"]).path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match="model.safetensors has changed"):
        verify(resolve(result["model_tag"]))


def test_steps_one_by_one_as_in_the_guide(bentoml_home: Path, base: Path) -> None:
    config = PackageConfig(
        model_name="my_model_v1",
        model_version="1.0.0",
        model_framework=ModelFramework.MLX,
        service_name="my_service",
        project_name="my_project",
        description="MLX-optimized model",
        labels={"env": "production", "team": "ml"},
        metadata={"training_date": "2025-10-22"},
    )
    packager = ModelPackager(config)
    with pytest.raises(ConfigError, match="model_path is not set"):
        packager.validate_model_path()
    config.model_path = base
    assert "language model" in packager.validate_model_path().description
    files = packager.collect_model_files()
    names = [file.relative_path for file in files]
    assert names == sorted(names)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    model = packager.create_bento_model()
    assert str(model.tag) == "my_model_v1:1.0.0"
    result = packager.package_model(build_bento=True, create_docker=False)
    assert result["bento_tag"] == "my_service:1.0.0"
    stored = bentoml.models.get("my_model_v1:1.0.0").info
    assert stored.labels == {"env": "production", "team": "ml", "project": "my_project"}
    assert stored.metadata["training_date"] == "2025-10-22"
    assert stored.metadata["description"] == "MLX-optimized model"


def test_patterns_choose_files(bentoml_home: Path, base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "notes").mkdir()
    (copy / "notes" / "log.txt").write_text("private")
    result = package_model(copy, exclude_patterns=["notes/**"], build_bento=False)
    stored = {file.path for file in ModelStore().get(result["model_tag"]).manifest.files}
    assert "notes/log.txt" not in stored
    with pytest.raises(PackagingError, match="left out by the patterns"):
        package_model(copy, include_patterns=["*.json"], build_bento=False)


def test_patterns_that_leave_out_what_loading_needs(
    bentoml_home: Path, base: Path, tmp_path: Path
) -> None:
    make_copy(tmp_path, base)
    (tmp_path / "vocab.json").write_text("{}")  # no tokenizer by itself
    with pytest.raises(PackagingError, match=r"the tokenizer of .* cannot be loaded"):
        package_model(tmp_path, "demo", exclude_patterns=["tokenizer.json"], build_bento=False)
    assert bentoml.models.list() == []


def make_missing(folder: Path, base: Path) -> None:
    folder.rmdir()


def make_empty(folder: Path, base: Path) -> None: ...


def make_without_weights(folder: Path, base: Path) -> None:
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())


def make_truncated(folder: Path, base: Path) -> None:
    make_without_weights(folder, base)
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])


def make_pickle(folder: Path, base: Path) -> None:
    make_without_weights(folder, base)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def make_unknown_architecture(folder: Path, base: Path) -> None:
    make_copy(folder, base)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))


def make_with_link_out(folder: Path, base: Path) -> None:
    make_copy(folder, base)
    (folder / "vocab.json").symlink_to("/etc/hostname")


def make_other_shapes(folder: Path, base: Path) -> None:
    make_copy(folder, base)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 4096}))


def make_adapter_of_another_base(folder: Path, base: Path) -> None:
    other = folder.parent / "wide"
    write_language_model(other, hidden=64)
    write_lora_adapter(folder, other, base_reference=str(base))


def make_untrained_adapter(folder: Path, base: Path) -> None:
    import mlx.core as mx

    write_lora_adapter(folder, base, base_reference=str(base))
    path = folder / "adapters.safetensors"
    tensors = dict(mx.load(str(path)).items())
    mx.save_safetensors(
        str(path),
        {k: mx.zeros_like(v) if k.endswith("lora_b") else v for k, v in tensors.items()},
    )


def make_adapter_that_matches_nothing(folder: Path, base: Path) -> None:
    import mlx.core as mx

    write_lora_adapter(folder, base, base_reference=str(base))
    path = folder / "adapters.safetensors"
    tensors = dict(mx.load(str(path)).items())
    mx.save_safetensors(str(path), {k.replace("self_attn", "other"): v for k, v in tensors.items()})


def make_adapter_without_base(folder: Path, base: Path) -> None:
    write_lora_adapter(folder, base, base_reference=str(folder / "nowhere"))


def make_without_a_setting(folder: Path, base: Path) -> None:
    write_language_model(folder, architecture="qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    del config["num_experts"]
    (folder / "config.json").write_text(json.dumps(config))


def make_with_broken_tokenizer(folder: Path, base: Path) -> None:
    make_copy(folder, base)
    (folder / "tokenizer.json").write_text("{}")


def make_adapter_without_a_place(folder: Path, base: Path) -> None:
    other = folder.parent / "tied"
    write_language_model(other, architecture="seed_oss", tie_word_embeddings=True)
    write_lora_adapter(folder, other, keys=["model.embed_tokens"])


def make_copy(folder: Path, base: Path) -> None:
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    "make",
    [
        make_missing,
        make_empty,
        make_without_weights,
        make_truncated,
        make_pickle,
        make_unknown_architecture,
        make_with_link_out,
        make_other_shapes,
        make_adapter_of_another_base,
        make_untrained_adapter,
        make_adapter_that_matches_nothing,
        make_adapter_without_base,
        make_without_a_setting,
        make_with_broken_tokenizer,
        make_adapter_without_a_place,
    ],
)
def test_bad_checkpoints_leave_nothing_behind(  # type: ignore[no-untyped-def]
    make, bentoml_home: Path, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    make(folder, base)
    with pytest.raises(BentoMLError) as caught:
        package_model(folder, "bad")
    assert caught.value.operation
    assert caught.value.details
    assert "\n" not in str(caught.value)
    assert bentoml.models.list() == []
    assert bentoml.bentos.list() == []


@pytest.mark.parametrize(
    "given",
    [
        {"model_name": "a\nb"},
        {"model_name": "a'b"},
        {"service_name": 'a"b'},
        {"project_name": "a\nb"},
        {"model_version": "final"},
        {"model_version": "latest"},
    ],
)
def test_bad_names_and_versions(bentoml_home: Path, base: Path, given: dict[str, str]) -> None:
    with pytest.raises(BentoMLError) as caught:
        package_model(base, **given)
    assert caught.value.details["value"] in given.values()
    assert bentoml.models.list() == []


def test_file_where_a_folder_belongs(bentoml_home: Path, base: Path) -> None:
    with pytest.raises(BentoMLError, match=r"config\.json"):
        package_model(base / "config.json", "demo")


def test_field_that_is_none(base: Path) -> None:
    with pytest.raises(ConfigError, match="has no field 'modle_name'"):
        package_model(base, modle_name="x")
    with pytest.raises(ConfigError, match="has no field 'modle_name'"):
        PackageConfig(modle_name="x")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="labels must map text to text"):
        PackageConfig(labels={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="model_framework 'jax' is not one of"):
        PackageConfig(model_framework="jax")


def test_framework_that_the_files_are_not(bentoml_home: Path, base: Path) -> None:
    with pytest.raises(PackagingError, match="model_framework is 'onnx'"):
        package_model(base, "demo", model_framework=ModelFramework.ONNX)


def test_package_is_linked_to_a_run(bentoml_home: Path, base: Path, tmp_path: Path) -> None:
    from mlops.client import create_client

    with create_client("support", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db") as client:
        result = package_model(base, "demo", "support", tracking=client)
        assert result["tracking"].linked is True


def test_packaging_succeeds_while_mlflow_is_down(bentoml_home: Path, base: Path) -> None:
    from mlops.client import create_client

    client = create_client("support", tracking_uri="http://127.0.0.1:9")
    result = package_model(base, "demo", "support", tracking=client)
    assert result["success"] is True
    assert (result["tracking"].linked, result["tracking"].queued) == (False, True)


def test_no_container_engine_is_said_clearly(
    bentoml_home: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with pytest.raises(PackagingError, match="no container engine answers"):
        package_model(base, "demo", create_docker=True)
    assert ModelStore().list() == bentoml.bentos.list() == []


def test_image_that_cannot_be_built_says_what_stays(
    bentoml_home: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is a mock: it answers, and builds nothing, as one without the network does."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\n" + 'case "$1" in info|version) exit 0;; *) exit 1;; esac\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(docker.parent), prepend=":")
    with pytest.raises(PackagingError) as caught:
        package_model(base, "demo", model_version="1.0.0", create_docker=True)
    stays = ["the model demo:1.0.0", "the Bento demo:1.0.0"]
    assert caught.value.details["stays"] == stays
    assert f"; {' and '.join(stays)} stay in the store" in str(caught.value)
    assert str(bentoml.bentos.get("demo:1.0.0").tag) == "demo:1.0.0"
    with pytest.raises(PackagingError) as again:
        package_model(base, "demo", model_version="1.0.0", create_docker=True)
    assert "stay" not in str(again.value), "nothing is new any more"


def test_base_that_was_stored_for_nothing_is_named(
    bentoml_home: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = write_language_model(tmp_path / "other", seed=9)
    package_model(other, "tone", model_version="1.0.0", build_bento=False)
    with pytest.raises(
        PackagingError, match=r"taken by other content.*; the model base:\w+ stays in the store"
    ):
        package_model(adapter, "tone", model_version="1.0.0")
    assert [entry.name for entry in ModelStore().list()] == ["base", "tone"]


def test_bento_that_cannot_be_built_leaves_a_model_that_is_named(
    bentoml_home: Path, base: Path, tmp_path: Path
) -> None:
    package_model(base, "one", service_name="chat", model_version="1.0.0")
    other = write_language_model(tmp_path / "other", seed=9)
    with pytest.raises(PackagingError, match=r"; the model two:1\.0\.0 stays in the store"):
        package_model(other, "two", service_name="chat", model_version="1.0.0")
    verify(resolve("two:1.0.0"))


def test_stored_adapter_over_another_base_is_refused(
    bentoml_home: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_language_model(other, seed=9)  # the same shapes, other weights
    tone = package_model(adapter, "tone", build_bento=False)["model_tag"]
    with pytest.raises(PackagingError, match="was packaged for another base model"):
        package_model(other, "other", adapters={"tone": tone})
    assert "other" not in {entry.name for entry in ModelStore().list()}
    with pytest.raises(PackagingError, match="not an adapter"):
        package_model(other, "other", adapters={"tone": other})
    assert "other" not in {entry.name for entry in ModelStore().list()}


def test_reference_with_a_digest_is_that_content_and_no_other(
    bentoml_home: Path, base: Path
) -> None:
    result = package_model(base, "demo", build_bento=False)
    assert resolve(f"demo@{result['model_digest']}").tag == result["model_tag"]
    with pytest.raises(IntegrityError, match="nothing of it is served"):
        resolve("demo@sha256:" + "0" * 64)


def test_store_in_a_hidden_folder(
    base: Path, bentoml_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / ".hidden" / "bentoml"))
    (tmp_path / ".hidden").mkdir()
    result = package_model(base, "demo")
    assert str(tmp_path / ".hidden") in bentoml.bentos.get(result["bento_tag"]).path


def test_adapter_takes_the_base_it_was_packaged_for_and_no_other(
    bentoml_home: Path, adapter: Path
) -> None:
    result = package_model(adapter, "tone", build_bento=False)
    manifest = ModelStore().get(result["model_tag"]).path / "mlops-manifest.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "base_tag": None}))  # not part of the digest
    resolved = resolve(result["model_tag"], digest=result["model_digest"])
    assert resolved.base is not None
    assert resolved.base.tag == result["base_model_tag"]
    bentoml.models.delete(result["base_model_tag"])
    with pytest.raises(IntegrityError, match="is not in the store any more"):
        resolve(result["model_tag"])


def test_stored_adapter_over_the_same_base_in_a_plain_folder(
    bentoml_home: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    tone = package_model(adapter, "tone", build_bento=False)["model_tag"]
    assert resolve(tone, base_model=base).base is not None
    other = tmp_path / "other"
    write_language_model(other, seed=9)
    with pytest.raises(PackagingError, match="was packaged for another base model"):
        resolve(tone, base_model=other)


@pytest.mark.parametrize(
    "patterns",
    [
        {"exclude_patterns": ["config.json"]},
        {"include_patterns": ["*.safetensors"]},
        {"exclude_patterns": ["tokenizer*"]},
    ],
)
def test_patterns_that_leave_out_what_serving_needs(
    patterns: dict[str, list[str]], bentoml_home: Path, base: Path
) -> None:
    with pytest.raises(PackagingError):
        package_model(base, "demo", **patterns)
    assert bentoml.models.list() == []


def test_model_without_a_tokenizer_is_stored_but_gets_no_bento(
    bentoml_home: Path, tmp_path: Path
) -> None:
    write_language_model(tmp_path / "mute", with_tokenizer=False)
    with pytest.raises(PackagingError, match="has no tokenizer"):
        package_model(tmp_path / "mute")
    assert bentoml.models.list() == []
    assert package_model(tmp_path / "mute", build_bento=False)["model_tag"]


def test_what_changed_after_it_was_looked_at_is_seen(
    bentoml_home: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    make_copy(folder, base)
    packager = ModelPackager(PackageConfig(model_path=folder))
    packager.validate_model_path()
    (folder / "vocab.json").symlink_to("/etc/hostname")
    with pytest.raises(PackagingError, match="vocab.json"):
        packager.create_bento_model()
    packager.config.model_path = adapter
    assert packager.package_model(build_bento=False)["base_model_tag"]


def test_new_labels_do_not_make_another_bento(bentoml_home: Path, base: Path) -> None:
    first = package_model(base, "demo", model_version="1.0.0", labels={"stage": "staging"})
    again = package_model(base, "demo", model_version="1.0.0", labels={"stage": "production"})
    assert again["unchanged"] is True
    assert again["bento_tag"] == first["bento_tag"]
    assert ModelStore().get("demo").labels["stage"] == "staging"


def test_name_of_the_folder_where_none_is_given(
    bentoml_home: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "user@host" / "My Model"
    folder.mkdir(parents=True)
    make_copy(folder, base)
    result = package_model(folder, build_bento=False)
    assert result["model_tag"].startswith("my-model:")
    assert result["renamed"] == {"My Model": "my-model"}
    monkeypatch.chdir(folder)
    assert package_model(".", build_bento=False)["unchanged"] is True


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": None},
        {"metadata": None},
        {"adapters": None},
        {"include_patterns": None},
        {"description": 5},
        {"description": "\ud800"},
        {"adapters": {"base": "x"}},
        {"labels": {"a": "\ud800"}},
    ],
)
def test_bad_values_are_told_before_anything_is_stored(
    fields: dict[str, object], bentoml_home: Path, base: Path
) -> None:
    with pytest.raises(ConfigError):
        package_model(base, "demo", **fields)


def test_hostile_description_stays_text(bentoml_home: Path, base: Path) -> None:
    text = "file:/etc/hostname"
    labels = {"note": "\"\"\"'''\n{{ 1 }}: [x]"}
    result = package_model(base, "demo", description=text, labels=labels)
    stored = bentoml.bentos.get(result["bento_tag"])
    assert stored.doc.strip() == text
    assert stored.info.labels["note"] == labels["note"]


def test_damaged_bento_is_told(bentoml_home: Path, base: Path) -> None:
    tag = package_model(base, "demo")["bento_tag"]
    (bentoml_home / "bentos" / tag.replace(":", "/") / "bento.yaml").write_text("{")
    with pytest.raises(PackagingError, match="is damaged: remove"):
        package_model(base, "demo")


def test_onnx_model_is_stored_but_not_served(bentoml_home: Path, tmp_path: Path) -> None:
    # ModelProto: ir_version 8, producer_name "t", an empty graph
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08\x12\x01t\x3a\x00")
    with pytest.raises(PackagingError, match="does not serve them"):
        package_model(tmp_path / "net.onnx", "net")
    result = package_model(tmp_path / "net.onnx", "net", build_bento=False)
    assert resolve(result["model_tag"]).checkpoint.framework == "onnx"


@pytest.mark.skipif(sys.platform != "linux", reason="takes the network away as Linux can")
def test_building_works_without_a_network(
    bentoml_home: Path, adapter: Path, tmp_path: Path
) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip(reason="this machine lets nobody take the network from a process")
    script = (
        "from mlops.serving.bentoml.packager import package_model\n"
        f"print(package_model({str(adapter)!r}, 'tone')['bento_tag'])\n"
    )
    done = subprocess.run(
        [*alone, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert bentoml.bentos.get(done.stdout.strip()).info.all_models


def test_a_base_that_a_trainer_loaded_from_the_store_is_that_entry(
    bentoml_home: Path, base: Path, tmp_path: Path
) -> None:
    stored = package_model(base, "llama", model_version="1.0.0", build_bento=False)
    entry = ModelStore().get(stored["model_tag"])
    write_lora_adapter(tmp_path / "tone", base, base_reference=str(entry.path))
    result = package_model(tmp_path / "tone", build_bento=False)
    assert result["base_model_tag"] == "llama:1.0.0"
    assert len(ModelStore().list()) == 2


def test_a_plain_folder_needs_no_store(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "no-folder"))
    assert resolve(base).tag is None
