"""What `adapter_config.json` of a PEFT adapter says: honoured, refused by name, or without effect.

Every field of PEFT's `LoraConfig` stands in one of the tables below; a test holds them to the
installed PEFT. The rules are those of PEFT 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlops.checkpoints.peft_patterns import ModulePatterns
from mlops.checkpoints.refusal import examples, refusal

CONFIG = "adapter_config.json"

HONOURED = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "init_lora_weights", "lora_alpha",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_parameters", "task_type",
    "use_dora", "use_rslora",
})  # fmt: skip

REFUSED_WHEN_SET = frozenset({
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config",
})  # fmt: skip
"""Settings that make an adapter more than a low-rank update of named modules."""

WITHOUT_EFFECT = frozenset({
    # Which modules were trained, which the tensors say themselves.
    "ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform",
    "target_modules",
    # How it was trained or begun; `init_lora_weights` says whether the base was changed with it.
    "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout",
    "lora_ga_config", "runtime_config",
    # How the base stores its weights, not what the update is.
    "fan_in_fan_out",
    # Parts of settings that are refused themselves.
    "megatron_core", "qalora_group_size",
    # Where it comes from.
    "auto_mapping", "peft_version", "revision",
    # Of other trainers, and of old versions of PEFT.
    "enable_lora", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights",
    "unsloth_fixed",
})  # fmt: skip

_UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""`init_lora_weights` that leave the base model's weights as they are."""

_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

_MERGE = "merge it into its model with PEFT and package the result"


class PeftConfig:
    """The settings of one adapter.

    Attributes:
        is_dora: `use_dora`.
        warnings: a sentence for each setting that is not known.

    Raises:
        PackagingError: it is no LoRA or DoRA, or has a setting that is not supported.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        _refuse_others(path, config)
        alpha = read_number(config.get("lora_alpha"))
        if alpha is None:
            raise refusal(
                f"lora_alpha in {CONFIG} is {str(config.get('lora_alpha'))[:80]!r}, not a number: "
                "write the one that the adapter was trained with",
                path,
                file=CONFIG,
            )
        rank = config.get("r")
        if rank is not None and (type(rank) is not int or rank < 1):
            raise refusal(f"r in {CONFIG} is {str(rank)[:80]!r}, not a rank", path, setting="r")
        self._path = path
        self._alpha = alpha
        self._rank = rank
        self._alphas = ModulePatterns(
            path, "alpha_pattern", config.get("alpha_pattern"), read_number
        )
        self._ranks = ModulePatterns(path, "rank_pattern", config.get("rank_pattern"), _read_rank)
        self._is_rank_stable = bool(config.get("use_rslora"))
        self.is_dora = bool(config.get("use_dora"))
        self.warnings = _unknown(path, config)

    def rank(self, module: str) -> int | None:
        """The rank that the settings give a module, by its name in the model that was trained."""
        own = self._ranks.find(module)
        return self._rank if own is None else int(own)

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's update: alpha / rank, or alpha / √rank with rsLoRA.

        Args:
            module: its name in the model that was trained.
            rank: of its tensors.

        Raises:
            PackagingError: the settings give it another rank: PEFT would not load it, and nobody
                can say which of the two the update was scaled with.
        """
        told = self.rank(module)
        if told is not None and told != rank:
            setting = "r" if told == self._rank else "rank_pattern"
            raise refusal(
                f"{CONFIG} of {self._path} gives {module} the rank {told} ({setting}), and its "
                f"tensors have {rank}: copy the file that was saved with them",
                self._path,
                setting=setting,
                module=module,
            )
        alpha = self._alphas.find(module)
        if alpha is None:
            alpha = self._alpha
        return alpha / (math.sqrt(rank) if self._is_rank_stable else rank)


def read_number(value: Any) -> float | None:
    """A finite number, or None when it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _read_rank(value: Any) -> float | None:
    return read_number(value) if type(value) is int and value > 0 else None


def _refuse_others(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise refusal(
            f"{path} is a PEFT adapter with peft_type {str(config.get('peft_type'))[:80]!r}; only "
            f"LORA (with DoRA and rsLoRA) is supported: {_MERGE}, where PEFT can",
            path,
            setting="peft_type",
        )
    if saved := config.get("modules_to_save"):
        names = [str(name)[:80] for name in saved] if isinstance(saved, list) else [str(saved)[:80]]
        raise refusal(
            f"the PEFT adapter {path} brings whole modules along (modules_to_save): "
            f"{examples(names)}; {_MERGE}",
            path,
            setting="modules_to_save",
        )
    if config.get("task_type") in _CLASSIFIERS:
        raise refusal(
            f"the PEFT adapter {path} was trained for a classifier (task_type "
            f"{config['task_type']}), not for generating text",
            path,
            setting="task_type",
        )
    for name, value in config.items():
        if value and (name in REFUSED_WHEN_SET or _is_unknown_variant(name)):
            raise refusal(
                f"the PEFT adapter {path} uses {examples([name[:80]])}, which is not supported; "
                f"{_MERGE}",
                path,
                setting=name[:80],
            )
    if config.get("bias", "none") != "none":
        raise refusal(
            f"the PEFT adapter {path} has bias {str(config['bias'])[:80]!r}: it changes biases of "
            f"the base model too; {_MERGE}",
            path,
            setting="bias",
        )
    if config.get("init_lora_weights") not in _UNCHANGED_BASE:
        raise refusal(
            f"the PEFT adapter {path} has init_lora_weights "
            f"{str(config['init_lora_weights'])[:80]!r}, which also changes the base "
            "model; convert it to plain LoRA when saving it "
            "(path_initial_model_for_weight_conversion)",
            path,
            setting="init_lora_weights",
        )


def _is_unknown_variant(name: str) -> bool:
    """True for the names that PEFT gives to new kinds of LoRA, of which none is known here."""
    is_variant = name.startswith("use_") or name.endswith("_config")
    return is_variant and name not in HONOURED | WITHOUT_EFFECT


def _unknown(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    known = HONOURED | REFUSED_WHEN_SET | WITHOUT_EFFECT
    names = sorted(name[:80] for name, value in config.items() if value and name not in known)
    if not names:
        return ()
    return (
        f"{CONFIG} of {path} has settings that are not known here, and were not looked at: "
        f"{examples(names)}",
    )
