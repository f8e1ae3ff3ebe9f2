"""Adapters beside torch and PEFT, the libraries that define the format: same logits, same tokens.

Torch runs in an environment and a process of its own (`tools/setup-reference`), once for all cases:
the bases and some of the adapters are written by us, the others are saved by PEFT itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
import transformers_forms
from engines import running, tokens_of
from mlops.checkpoints import ModuleNames, check_copies, recognise
from mlops.engine import GenerationRequest, load_model
from mlops.engine.owner import run_in_owner
from mlops.errors import PackagingError
from torch_process import PYTHON, run_in_torch

PROMPT = (72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100)
MAX_TOKENS = 8
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERT_PARAMETERS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "r": 4,
    "lora_alpha": 6,
}
OTHER_FORMS = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss", "gpt2")
STACKED = ("mixtral", "olmoe", "qwen3_moe")
CONV1D = ["c_attn", "c_proj", "c_fc"]

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
        experts: arguments of `transformers_forms.write_expert_adapter`; torch gets the same update
            with all experts padded to one rank.
        save_embedding_layers: of PEFT's `save_pretrained`, whose default copies base layers that
            the adapter changes into the adapter.
    """

    architecture: str = "llama"
    written: dict[str, Any] | None = None
    saved: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
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
    "saved-with-copies": Case(
        saved={"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        save_embedding_layers="auto",
    ),
    "saved-with-copies-tied": Case(
        "qwen3",
        saved={"target_modules": ["lm_head"]},
        tied=True,
        save_embedding_layers="auto",
    ),
    "saved-embedding": Case(saved={"target_modules": ["q_proj", "embed_tokens"]}),
    "saved-tied-embedding": Case("qwen3", saved={"target_modules": ["embed_tokens"]}, tied=True),
    "base-mixtral": Case("mixtral"),
    "base-olmoe": Case("olmoe"),
    "base-qwen3_moe": Case("qwen3_moe"),
    "base-gpt_oss": Case("gpt_oss"),
    "base-gpt2": Case("gpt2"),
    "experts-mixtral": Case("mixtral", experts={}),
    "experts-olmoe": Case("olmoe", experts={"alpha": 16.0}),
    "experts-qwen3_moe": Case("qwen3_moe", experts={"absent": [1, 2], "ranks": {3: 2}}),
    "parameters-mixtral": Case("mixtral", saved=EXPERT_PARAMETERS),
    "parameters-olmoe": Case("olmoe", saved=EXPERT_PARAMETERS),
    "parameters-qwen3_moe": Case("qwen3_moe", saved=EXPERT_PARAMETERS),
    "parameters-gpt_oss": Case("gpt_oss", saved=EXPERT_PARAMETERS),
    "parameters-gate-up": Case(
        "mixtral",
        saved={
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"],
        },
    ),
    "parameters-rslora-ranks": Case(
        "olmoe",
        saved={
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"gate_up_proj": 5},
        },
    ),
    "saved-tied-lm-head": Case("qwen3", saved={"target_modules": ["lm_head", "q_proj"]}, tied=True),
    "saved-tied-dora-lm-head": Case(
        "qwen3", saved={"target_modules": ["lm_head"], "use_dora": True}, tied=True
    ),
    "saved-tied-both": Case(
        "qwen3", saved={"target_modules": ["lm_head", "embed_tokens"]}, tied=True
    ),
    "saved-tied-together": Case(
        "qwen3",
        saved={"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        tied=True,
    ),
    "gpt2-lora": Case("gpt2", saved={"target_modules": CONV1D, "fan_in_fan_out": True}),
    "gpt2-dora": Case(
        "gpt2", saved={"target_modules": CONV1D, "fan_in_fan_out": True, "use_dora": True}
    ),
    "gpt2-default": Case("gpt2", saved={"target_modules": ["c_attn", "lm_head"]}),
}
REFUSED = {
    # PEFT has a magnitude for each column of an embedding, mlx-lm one for each row.
    "32 magnitudes for model.embed_tokens": Case(
        saved={"target_modules": ["embed_tokens"], "use_dora": True}
    ),
    "down_proj .*is square": Case(
        "qwen3_moe", saved={"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
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
    ours: list[tuple[Path, Path | None]] = []
    for case in ALL_CASES.values():
        base, theirs = write_base(folder, case)
        adapter = None
        if case.written is not None or case.saved is not None or case.experts is not None:
            adapter = folder / str(len(jobs))
        padded = adapter
        if adapter is not None and case.written is not None:
            tiny_models.write_peft_adapter(adapter, base, **case.written)
        if adapter is not None and case.experts is not None:
            transformers_forms.write_expert_adapter(adapter, theirs, **case.experts)
            padded = transformers_forms.write_expert_adapter(
                folder / f"{adapter.name}-padded", theirs, is_padded=True, **case.experts
            )
        ours.append((base, adapter))
        jobs.append(
            {
                "base": str(theirs),
                "adapter": padded and str(padded),
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
    run_in_torch(script, folder / "jobs.json", folder / "results.npz", timeout_s=240)
    results = np.load(folder / "results.npz")
    cases = {
        name: Reference(
            *ours[number],
            results[f"logits-{number}"],
            tuple(results[f"tokens-{number}"].tolist()),
        )
        for number, name in enumerate(ALL_CASES)
    }
    names = {
        architecture: json.loads(str(results[f"names-{number}"]))
        for number, architecture in enumerate(ARCHITECTURES, start=len(cases))
    }
    return References(cases, names)


@pytest.fixture
def references(of_torch: References) -> dict[str, Reference]:
    return of_torch.cases


def write_base(folder: Path, case: Case) -> tuple[Path, Path]:
    """The base model for us and for torch, unless it is there."""
    base = folder / case.base
    theirs = folder / f"{case.base}-transformers"
    if not base.exists():
        tiny_models.write_language_model(
            base, architecture=case.architecture, tie_word_embeddings=case.tied
        )
        if case.architecture in OTHER_FORMS:
            transformers_forms.write_transformers_form(theirs, base)
    if case.architecture not in OTHER_FORMS:
        return base, base
    # mlx-lm reads Transformers' form as well, but for the experts of gpt-oss.
    return (base if case.architecture == "gpt_oss" else theirs), theirs


def our_logits(base: Path, adapter: Path | None, token_ids: Sequence[int]) -> Any:
    """Logits of every token, (tokens, vocabulary), float32."""

    def compute() -> Any:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        from mlops.engine.banks import AdapterBanks

        model, _ = load_model(base)
        banks = AdapterBanks(model, recognise(base), "cpu")
        slot = 0
        if adapter is not None:
            slot = banks.load("adapter", recognise(adapter))
            assert banks.num_bytes(recognise(adapter)) == num_bytes_by_position(banks)
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


@pytest.mark.parametrize("base", sorted({case.base for case in CASES.values()}))
def test_all_adapters_of_a_base_share_a_batch(references: dict[str, Reference], base: str) -> None:
    """Each row has its own adapter's logits, the base's rows to the bit what they are alone."""
    rows = [references[name] for name, case in CASES.items() if case.base == base]
    rows += rows[::-1]

    def compute() -> tuple[Any, Any]:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        from mlops.engine.banks import AdapterBanks

        model, _ = load_model(rows[0].base)
        banks = AdapterBanks(model, recognise(rows[0].base), "cpu")
        adapters = {row.adapter: recognise(row.adapter) for row in rows if row.adapter}
        alone = np.array(model(mx.array([PROMPT] * len(rows))))
        slots: dict[Path | None, int] = {None: 0}
        for path, adapter in adapters.items():
            slots[path] = banks.load(path.name, adapter)
        banks.use(banks.select([slots[row.adapter] for row in rows]))
        mixed = np.array(model(mx.array([PROMPT] * len(rows))))
        for slot in slots.values():
            if slot:
                banks.unload(slot)
        assert banks.num_resident_bytes == 0
        return mixed, alone

    mixed, alone = run_in_owner(compute)
    for row, reference in enumerate(rows):
        np.testing.assert_allclose(mixed[row], reference.logits, atol=1e-4, rtol=1e-4)
        if reference.adapter is None:
            np.testing.assert_array_equal(mixed[row], alone[row])


def test_gpt_oss_with_a_linear_for_each_expert(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    """Unsloth's 4-bit gpt-oss has lists of linears where Transformers has parameters."""
    from safetensors.numpy import load_file, save_file

    reference = references["parameters-gpt_oss"]
    assert reference.adapter is not None
    folder = shutil.copytree(reference.adapter, tmp_path / "lists")
    rank, tensors = EXPERT_PARAMETERS["r"], {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = key.partition(".lora_")
        if not module.endswith((".experts", ".experts.base_layer")):
            tensors[key] = tensor
            continue
        leaf = "gate_up_projs" if module.endswith(".base_layer") else "down_projs"
        experts = tensor.reshape(-1, rank, tensor.shape[1])
        if part.startswith("B"):
            experts = tensor.reshape(len(tensor), rank, -1).transpose(2, 0, 1)
        for number, expert in enumerate(experts):
            name = f"{module.removesuffix('.base_layer')}.{leaf}.{number}.lora_{part}"
            tensors[name] = np.ascontiguousarray(expert)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_parameters"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = our_logits(reference.base, folder, PROMPT)
    np.testing.assert_allclose(ours, reference.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["mixtral", "gpt_oss", "qwen3-tied"])
def test_the_engine_answers_as_torch_does(references: dict[str, Reference], base: str) -> None:
    """Requests for all adapters of a base and for the base itself, decoded together."""
    rows = {name: references[name] for name, case in CASES.items() if case.base == base}
    folders = {name: row.adapter for name, row in rows.items() if row.adapter is not None}
    requests = [
        GenerationRequest(
            PROMPT,
            adapter=name if name in folders else None,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
        )
        for name in rows
    ]
    with running(load_model(next(iter(rows.values())).base), folders) as one:
        one.preload()
        expected = [row.tokens for row in rows.values()]
        assert tokens_of(one, *requests) == expected
        assert one.statistics()["steps"]["mixed"] >= 1
    assert len(set(expected)) > 1


def num_bytes_by_position(banks: Any) -> int:
    """Bytes that one adapter takes in all banks that there are."""
    return sum(
        array.nbytes // array.shape[0]
        for layer in banks._layers.values()
        for bank in layer.banks.by_rank.values()
        for array in bank.arrays
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.base in STACKED])
def test_a_base_that_mlx_lm_has_saved_takes_the_same_adapters(
    references: dict[str, Reference], name: str
) -> None:
    reference = references[name]
    saved = reference.base.with_name(CASES[name].base)
    assert saved != reference.base
    ours = our_logits(saved, reference.adapter, PROMPT)
    np.testing.assert_allclose(ours, reference.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_parameters_as_older_versions_of_peft_lay_them_out(
    references: dict[str, Reference], architecture: str, tmp_path: Path
) -> None:
    """A has the outputs and B the inputs, as PEFT 0.18 saves them for all of these but gpt-oss."""
    from safetensors.numpy import load_file, save_file

    reference = references[f"parameters-{architecture}"]
    assert reference.adapter is not None
    older = shutil.copytree(reference.adapter, tmp_path / "older")
    tensors = load_file(older / "adapter_model.safetensors")
    rank = EXPERT_PARAMETERS["r"]
    for key in [key for key in tensors if ".experts." in key and ".lora_A." in key]:
        other = key.replace(".lora_A.", ".lora_B.")
        a, b = tensors[key], tensors[other]
        inputs = a.reshape(-1, rank, a.shape[1]).transpose(2, 1, 0)
        outputs = b.reshape(b.shape[0], rank, -1).transpose(2, 1, 0)
        tensors[key] = np.ascontiguousarray(outputs.reshape(-1, b.shape[0]))
        tensors[other] = np.ascontiguousarray(inputs.reshape(a.shape[1], -1))
    save_file(tensors, older / "adapter_model.safetensors", metadata={"format": "pt"})
    ours = our_logits(reference.base, older, PROMPT)
    np.testing.assert_allclose(ours, reference.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if "copies" in name])
def test_copies_of_the_bases_layers_are_compared(
    references: dict[str, Reference], tmp_path: Path, name: str
) -> None:
    """PEFT's default writes them; when the layer was trained or resized, they are no copies."""
    reference = references[name]
    assert reference.adapter is not None
    base = recognise(reference.base)
    assert recognise(reference.adapter).adapter.copies  # type: ignore[union-attr]
    check_copies(recognise(reference.adapter), base)
    from safetensors.numpy import load_file, save_file

    changed = Path(shutil.copytree(reference.adapter, tmp_path / "changed"))
    tensors = load_file(changed / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("base_layer.weight"))
    tensors[key][-1, -1] += 1
    save_file(tensors, changed / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackagingError, match="which is not as it is in .*save_embedding_layers"):
        check_copies(recognise(changed), base)


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
