"""What errors of the packages below say at the command line."""

from __future__ import annotations

import pytest

from mlops.cli.wording import at_the_command_line


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("pass base_model= with where it is", "pass --base-model with where it is"),
        ("it takes no base_model.", "it takes no --base-model."),
        ("BentoMLConfig.port is 0", "port is 0"),
    ],
)
def test_arguments_are_options(sentence: str, told: str) -> None:
    assert at_the_command_line(sentence) == told


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "module.base_model.model.lm_head.lora_A.weight",
        "models/base_model",
        "'base_model'",
    ],
)
def test_names_of_tensors_and_files_stay_as_they_are(name: str) -> None:
    assert at_the_command_line(f"the adapter holds {name}: save it") == (
        f"the adapter holds {name}: save it"
    )
