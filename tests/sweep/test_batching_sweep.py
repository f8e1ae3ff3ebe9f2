"""The trial's verdict on every architecture of mlx-lm, against what its batches really give."""

from __future__ import annotations

import pytest

import batched_truth
import every_architecture
import tiny_models
from mlops import engine
from mlops.engine import LoadedModel

pytestmark = pytest.mark.long

NOT_HERE = {
    "bitnet": "its kernel is for Metal",
    "muse_spark": "its kernel is for Metal",
    "phi3small": "mlx-lm's own answer differs between pieces of a text and the whole",
    "plamo3": "mlx-lm's own answer differs between pieces of a text and the whole",
    "prism_hadamard_qwen35": "it has weights of two bits only, in a form of its own",
}

EACH_PROMPT_ALONE = {
    *("baichuan_m1", "bailing_moe_linear", "jamba", "mamba", "nemotron_h", "olmo_hybrid"),
    *("recurrent_gemma", "rwkv7"),
}
"""mlx-lm computes their prompts of different lengths wrongly together, and their rows right."""

NOT_BATCHED = {
    "afm7",  # wrong for rows of different lengths
    *("deepseek_v41", "gpt_bigcode", "llama4", "longcat_flash_ngram"),  # caches that fail together
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return engine.load_model(tiny_models.write_language_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("architecture", sorted({*every_architecture.names()} - {*NOT_HERE}))
def test_the_verdict_is_true(loaded: LoadedModel, architecture: str) -> None:
    verdict, truth = batched_truth.verdict_and_truth(loaded, architecture)
    assert verdict == truth
    decoded = architecture not in NOT_BATCHED
    assert verdict == (decoded, decoded and architecture not in EACH_PROMPT_ALONE)


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss", "cohere2", "exaone4", "olmo3"])
def test_windows_that_the_trial_cuts(loaded: LoadedModel, architecture: str) -> None:
    """40 tokens are more than the trial fills a window with, and less than the texts here."""
    settings = {"sliding_window": 40}
    assert batched_truth.verdict_and_truth(loaded, architecture, **settings) == (
        (True, True),
        (True, True),
    )
