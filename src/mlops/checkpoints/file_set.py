"""Which files a checkpoint consists of: one set, the same for checking, hashing, storing, loading.

    recognised: weights and their index -> `file_set` adds what goes with them -> `Checkpoint.files`
    packaging: `Checkpoint.files`, changed by the user's patterns -> `stored_files`

A trainer's output folder holds far more than its model: earlier checkpoints, the optimizer's state,
logs, scripts. What goes with a language model or an adapter is known by name, so the rest is left
out, whatever it is. Which files a model of another library reads is known to that library alone: of
such a folder only what is certainly a trainer's is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from mlops.checkpoints.checkpoint import Checkpoint
from mlops.checkpoints.files import (
    PICKLE_SUFFIXES,
    CheckpointFile,
    Folder,
    is_code,
    is_pickle,
    matches_any,
    refuse_too_many,
)
from mlops.checkpoints.pooling import pooling_files
from mlops.checkpoints.refusal import examples, printable, refusal
from mlops.counts import count

_SETTINGS = (
    "config.json", "configuration.json", "generation_config.json", "adapter_config.json",
    "hf_quant_config.json", "quant_config.json", "quantize_config.json", "*tokenizer_config.json",
    "*processor_config.json", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "*.tiktoken", "tekken.json", "*vocab*.json", "*vocab*.txt", "vocab.bpe", "merges.txt", "*.spm",
    "*spiece*.model", "sentencepiece*.model", "spm*.model", "tiktoken.model", "bpe.codes",
    "dict.txt", "emoji.json", "byte_maps.json", "normalizer.json", "prophetnet.tokenizer",
    "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
_TEMPLATES = ("*.jinja", "chat_template.json")
_PAPERS = (
    "readme*", "*licen[sc]e*", "notice*", "copying*", "citation*", "use_policy*", "*model_card*",
    "modelcard*",
)  # fmt: skip
COMPANIONS = (*_SETTINGS, *_TOKENIZER, *_TEMPLATES, *_PAPERS)
"""What goes with weights: names at the top of the folder, in lower case."""

TEMPLATES_FOLDER = "additional_chat_templates"

TRAINING = (
    "/checkpoint-*", "/checkpoint_*", "/global_step*", "/runs", "/wandb", "/mlruns", "/logs",
    "/lightning_logs", "/tensorboard", "trainer_state.json", "training_args.json",
    "all_results.json", "train_results.json", "eval_results.json", "events.out.tfevents.*",
)  # fmt: skip
"""What trainers leave beside a model of another library."""

MAX_NAMED = 100
"""How many names `left_out` holds at most; then it counts."""


def companions(files: Mapping[str, CheckpointFile]) -> list[str]:
    """Names of what goes with the weights of a language model or an adapter."""
    return [name for name in files if _is_companion(name)] + pooling_files(files)


def of_another_library(folder: Folder) -> dict[str, CheckpointFile]:
    """The files of a folder that may belong to a model of another library, by relative path."""
    names = [name for name in folder if not is_code(name) and not matches_any(TRAINING, name)]
    refuse_too_many(folder.path, names)
    return {name: folder[name] for name in names if not is_pickle(folder[name])}


def stored_files(
    checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[CheckpointFile]:
    """What is stored of a checkpoint, ordered by path: its files, as changed by a user's patterns.

    Args:
        include: globs as in `list_files`. When one of them matches a file of the checkpoint, they
            say what is stored, and nothing else is. Otherwise what they match is stored as well.
        exclude: globs of what is not stored.

    Raises:
        PackagingError: a file is gone or may not be read, or a pattern asks only for pickles or
            code, which are never stored.
    """
    folder = Folder(checkpoint.path)
    own = set(checkpoint.files)
    asked = _asked_for(checkpoint, folder, include)
    chosen = asked if asked & own else own | asked
    refuse_too_many(checkpoint.path, chosen)
    for name in sorted(chosen - set(folder)):
        raise refusal(
            f"{name} is gone from {checkpoint.path}; something else writes to this folder",
            checkpoint.path,
            file=name,
        )
    return [folder[name] for name in sorted(chosen) if not matches_any(exclude, name)]


def left_out(checkpoint: Checkpoint, stored: Iterable[CheckpointFile]) -> tuple[str, ...]:
    """What lies beside the stored files, in the form of `Checkpoint.left_out`."""
    names = {file.relative_path for file in stored}
    return summary(name for name in Folder(checkpoint.path) if name not in names)


def summary(names: Iterable[str]) -> tuple[str, ...]:
    """Names of files, and of folders with how many files they hold: `checkpoint-50/ (5 files)`."""
    tops = Counter(name.split("/")[0] + "/" * ("/" in name) for name in names)
    lines = sorted(
        f"{printable(top)} ({count(number, 'file')})" if top.endswith("/") else printable(top)
        for top, number in tops.items()
    )
    if len(lines) <= MAX_NAMED:
        return tuple(lines)
    return (*lines[:MAX_NAMED], f"and {len(lines) - MAX_NAMED} more")


def _is_companion(name: str) -> bool:
    folder, _, leaf = name.rpartition("/")
    if folder == TEMPLATES_FOLDER:
        return leaf.endswith(".jinja")
    if folder or is_code(name) or name.lower().endswith(tuple(PICKLE_SUFFIXES)):
        return False
    return any(fnmatchcase(name.lower(), pattern) for pattern in COMPANIONS)


def _asked_for(checkpoint: Checkpoint, folder: Folder, include: Sequence[str]) -> set[str]:
    asked = set()
    for pattern in include:
        found = [name for name in folder if matches_any([pattern], name)]
        allowed = [name for name in found if not is_code(name) and not is_pickle(folder[name])]
        if found and not allowed:
            raise refusal(
                f"code and pickles are never stored, and {pattern!r} in include_patterns matches "
                f"nothing else: {examples(found)}",
                checkpoint.path,
                "collect_model_files",
                files=found[:10],
            )
        asked.update(allowed)
    return asked
