"""Adapters beside torch and PEFT, the libraries that define the format: same logits, same tokens.

Torch runs in an environment and a process of its own (`tools/setup-reference`), once for all cases:
the bases and some of the adapters are written by us, the others are saved by PEFT itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from mlops.checkpoints import ModuleNames, recognise
from mlops.engine.owner import run_in_owner
from mlops.errors import PackagingError

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".tools" / "reference" / "bin" / "python"
PROMPT = (72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100)
MAX_TOKENS = 8
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="torch and PEFT are not in .tools/reference: make reference"
)


@dataclass(frozen=True)
class Case:
    """One adapter on one base.

    Attributes:
        written: arguments of `tiny_models.write_peft_adapter`; None: PEFT saves the adapter itself.
        saved: fields of PEFT's `LoraConfig`.
        tied: the base's output layer is its embedding.
        save_embedding_layers: of PEFT's `save_pretrained`, whose default copies base layers that
            the adapter changes into the adapter.
    """

    architecture: str = "llama"
    written: dict[str, Any] | None = None
    saved: dict[str, Any] | None = None
    tied: bool = False
    save_embedding_layers: bool | str = False

    @property
    def base(self) -> str:
        return f"{self.architecture}-tied" if self.tied else self.architecture


CASES = {
    "base-llama": Case(),
    "base-qwen3": Case("qwen3"),
    "base-tied": Case("qwen3", tied=True),
    "written-lora": Case(written={"target_modules": EVERY_LINEAR}),
    "written-rslora": Case(written={"use_rslora": True}),
    "written-dora": Case("qwen3", written={"dora": True, "target_modules": EVERY_LINEAR}),
    "written-patterns": Case(
        "qwen3", written={"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1.0}}
    ),
    "saved-lora": Case(saved={"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}),
    "saved-all-linear": Case("qwen3", saved={"target_modules": "all-linear", "r": 8}),
    "saved-rslora": Case(
        saved={"target_modules": list(EVERY_LINEAR), "use_rslora": True, "r": 16, "lora_alpha": 4}
    ),
    "saved-dora": Case(saved={"target_modules": list(EVERY_LINEAR), "use_dora": True, "r": 4}),
    "saved-dora-rslora": Case(
        "qwen3", saved={"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}
    ),
    "saved-patterns": Case(
        "qwen3",
        saved={
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 16, "v_proj": 3},
        },
    ),
    "saved-patterns-from-the-start": Case(
        saved={
            "target_modules": ["q_proj", "v_proj"],
            "r": 4,
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 32, "q_proj": 2},
        }
    ),
    "saved-expressions": Case(
        "qwen3",
        saved={
            "target_modules": r".*\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.(up|down)_proj)",
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {r"layers\.[1-9]\d*\.self.*": 2, r".*\.(up|down)_proj": 6},
            "alpha_pattern": {r"^model\.layers\.0\..*(q|v)_proj": 16, r"mlp\..*?": 3, ".*": 5},
        },
    ),
    "saved-expressions-rslora": Case(
        saved={
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "use_rslora": True,
            "r": 4,
            "rank_pattern": {r"layers\.(0|3)\.self_attn\.\w+": 16},
            "alpha_pattern": {"(q|k)?_proj|up_proj": 2, r"(?:self_attn\.)k_proj": 32},
        },
    ),
    "saved-mica": Case(saved={"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "saved-orthogonal": Case(
        saved={"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}
    ),
    "saved-some-layers": Case(saved={"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "saved-lm-head": Case(saved={"target_modules": ["q_proj", "lm_head"]}),
    "saved-embedding": Case(saved={"target_modules": ["q_proj", "embed_tokens"]}),
    "saved-tied-embedding": Case("qwen3", saved={"target_modules": ["embed_tokens"]}, tied=True),
}
REFUSED = {
    # PEFT has a magnitude for each column of an embedding, mlx-lm one for each row.
    "32 magnitudes for model.embed_tokens": Case(
        saved={"target_modules": ["embed_tokens"], "use_dora": True}
    ),
    "embed_tokens.base_layer": Case(
        saved={"target_modules": ["embed_tokens"]}, save_embedding_layers="auto"
    ),
    "the base has no lm_head": Case(
        "qwen3",
        saved={"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        tied=True,
    ),
    "modules_to_save": Case(saved={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "has bias": Case("qwen2", saved={"target_modules": ["q_proj"], "bias": "lora_only"}),
    "velora_config": Case(
        saved={"target_modules": ["q_proj"], "velora_config": {"num_groups": 4, "scale": 0.5}}
    ),
    "init_lora_weights": Case(saved={"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
}
"""By what the error says."""

ALL_CASES = CASES | REFUSED

ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "olmoe", "qwen3_moe", "phi3",
    "seed_oss", "gpt2", "lfm2", "qwen3_next",
)  # fmt: skip
"""Those of which torch's names for modules are held against mlx-lm's."""


@dataclass(frozen=True)
class Reference:
    """What torch computes: logits (tokens, vocabulary), float32, and the tokens of greedy decoding.

    Attributes:
        adapter: folder of the adapter; None is the base alone.
    """

    base: Path
    adapter: Path | None
    logits: Any
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class References:
    """What torch said in its one process.

    Attributes:
        names: shapes of the weights of torch's modules, by architecture and name.
    """

    cases: dict[str, Reference]
    names: dict[str, dict[str, list[int]]]


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> References:
    folder = tmp_path_factory.mktemp("references")
    jobs: list[dict[str, Any]] = []
    for case in ALL_CASES.values():
        base, adapter = folder / case.base, None
        if not base.exists():
            tiny_models.write_language_model(
                base, architecture=case.architecture, tie_word_embeddings=case.tied
            )
        if case.written is not None or case.saved is not None:
            adapter = folder / str(len(jobs))
        if adapter is not None and case.written is not None:
            tiny_models.write_peft_adapter(adapter, base, **case.written)
        jobs.append(
            {
                "base": str(base),
                "adapter": adapter and str(adapter),
                "save": case.saved,
                "save_embedding_layers": case.save_embedding_layers,
                "prompt": PROMPT,
                "max_tokens": MAX_TOKENS,
            }
        )
    for architecture in ARCHITECTURES:
        base = folder / architecture
        if not base.exists():
            tiny_models.write_language_model(base, architecture=architecture)
        jobs.append({"names_of": str(base)})
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("peft_reference.py")
    done = subprocess.run(
        [PYTHON, script, folder / "jobs.json", folder / "results.npz"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = np.load(folder / "results.npz")
    cases = {
        name: Reference(
            Path(job["base"]),
            job["adapter"] and Path(job["adapter"]),
            results[f"logits-{number}"],
            tuple(results[f"tokens-{number}"].tolist()),
        )
        for number, (name, job) in enumerate(zip(ALL_CASES, jobs, strict=False))
    }
    names = {
        architecture: json.loads(str(results[f"names-{number}"]))
        for number, architecture in enumerate(ARCHITECTURES, start=len(cases))
    }
    return References(cases, names)


@pytest.fixture
def references(of_torch: References) -> dict[str, Reference]:
    return of_torch.cases


def our_logits(base: Path, adapter: Path | None, token_ids: Sequence[int]) -> Any:
    """Logits of every token, (tokens, vocabulary), float32."""

    def compute() -> Any:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        from mlops.engine.banks import AdapterBanks

        model, _ = load_model(base)
        banks = AdapterBanks(model, recognise(base), "cpu")
        slot = 0 if adapter is None else banks.load("adapter", recognise(adapter))
        banks.use(banks.select([slot]))
        return np.array(model(mx.array([token_ids]))[0].astype(mx.float32))

    return run_in_owner(compute)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_those_of_peft(references: dict[str, Reference], name: str) -> None:
    reference = references[name]
    text = (*PROMPT, *reference.tokens)
    ours = our_logits(reference.base, reference.adapter, text)
    np.testing.assert_allclose(ours[: len(PROMPT)], reference.logits, atol=1e-4, rtol=1e-4)
    assert tuple(ours[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist()) == reference.tokens
    if reference.adapter is not None:
        alone = our_logits(reference.base, None, PROMPT)
        assert np.abs(reference.logits - alone).max() > 1e-2, "the adapter changes nothing"


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_not_compute_the_same_is_refused(
    references: dict[str, Reference], reason: str
) -> None:
    with pytest.raises(PackagingError, match=reason):
        our_logits(references[reason].base, references[reason].adapter, PROMPT)


@pytest.mark.parametrize(
    ("prefix", "middle"),
    [
        ("", "default."),
        ("base_model.model.", "my_adapter."),
        ("module.base_model.model._orig_mod.", ""),
        ("base_model.model.model.language_", ""),
        ("base_model.model._fsdp_wrapped_module.", "default."),
    ],
)
def test_other_names_for_the_same_modules_compute_the_same(
    references: dict[str, Reference], tmp_path: Path, prefix: str, middle: str
) -> None:
    """As raw state dicts, wrappers and multimodal models spell what PEFT has saved."""
    reference = references["saved-expressions"]
    assert reference.adapter is not None

    def rename(name: str) -> str:
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        return f"{prefix}{module}.lora_{rest.replace('.weight', f'.{middle}weight')}"

    adapter = rewritten(reference.adapter, tmp_path / "adapter", rename)
    ours = our_logits(reference.base, adapter, PROMPT)
    np.testing.assert_allclose(ours, reference.logits, atol=1e-4, rtol=1e-4)


def rewritten(adapter: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a PEFT adapter with other names for its tensors."""
    import mlx.core as mx

    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {rename(name): array + 0 for name, array in mx.load(str(weights)).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(weights), tensors)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_torchs_names_find_mlx_lms_modules(of_torch: References, architecture: str) -> None:
    """Every linear and embedding of torch's model, and its weight has the same shape there."""
    from mlops.engine.mlx_lm import find_model_classes

    def shapes() -> dict[str, tuple[int, ...]]:
        config = tiny_models._config(architecture, 32, 2, tiny_models.vocabulary_size(), False)
        model_class, args_class = find_model_classes(config)
        modules = model_class(args_class.from_dict(config)).named_modules()
        return {name: layer.weight.shape if "weight" in layer else () for name, layer in modules}

    modules = run_in_owner(shapes)
    names = ModuleNames(modules)
    theirs = of_torch.names[architecture]
    assert len(theirs) > 8
    for name, shape in theirs.items():
        found = names.find(f"base_model.model.{name}")
        if found is None:  # tied, though its configuration does not say so
            assert name == "lm_head"
            assert "output layer is its embedding" in names.why_not(name)
        else:
            assert modules[found] in (tuple(shape), tuple(reversed(shape))), name
