import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.errors import PackagingError
from mlops.registry import tags


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_adapter_v1", "lora_adapter_v1"),
        ("My Model", "my-model"),
        ("mlx-community/Llama-3.2-1B", "mlx-community-llama-3.2-1b"),
        ("_hidden_", "hidden"),
        ("a", "a"),
    ],
)
def test_name_becomes_what_a_tag_allows(name: str, expected: str) -> None:
    assert tags.valid_name(name) == expected


@pytest.mark.parametrize(
    "name", ["", "a\nb", 'a"b', "a'b", "a;b", "a$(b)", "ä", "-", "../", "x" * 64, "a:b", "\x00"]
)
def test_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(PackagingError) as caught:
        tags.valid_name(name)
    assert caught.value.operation == "validate_name"
    assert caught.value.details["field"] == "model_name"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.0.0", "1.0.0"),
        ("v1.2.3", "v1.2.3"),
        ("1.2.3-beta.1", "1.2.3-beta.1"),
        ("1.2.3+Build.5", "1.2.3-build.5"),
        ("2025.10.22", "2025.10.22"),
        ("1.0.0rc1", "1.0.0rc1"),
    ],
)
def test_version_becomes_what_a_tag_allows(version: str, expected: str) -> None:
    assert tags.valid_version(version) == expected


@pytest.mark.parametrize(
    "version",
    [
        "",
        "1",
        "1.0",
        "1.0rc1",
        "1.0.0.1",
        "b65e4e139dbe",
        "latest",
        "final",
        "1.0.0\n",
        "1 0",
        "../1.0",
        "1.0.0'",
        "1.0.0-",
        "9" * 64,
    ],
)
def test_version_that_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(PackagingError) as caught:
        tags.valid_version(version)
    assert caught.value.details == {"field": "model_version", "value": version}


@given(st.text(max_size=80))
def test_whatever_is_accepted_is_a_tag_of_bentoml(text: str) -> None:
    from bentoml._internal.tag import validate_tag_str

    for make in (tags.valid_name, tags.valid_version):
        try:
            part = make(text)
        except PackagingError:
            continue
        validate_tag_str(part)
        assert tags.is_tag(part)
