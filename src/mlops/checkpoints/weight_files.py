"""Which `*.safetensors` of a folder are its model's weights, where there is more than one set.

Other loaders disagree: transformers takes `model.safetensors` and does not look at an index beside
it, mlx-lm merges every `model*.safetensors`. Here one set is chosen, the first of these:

1. the files that `model.safetensors.index.json` names, unless none of them is there;
2. `model.safetensors`;
3. the shards `model-00001-of-0000N.safetensors`, then those of another name (`model.fp16-…`);
4. any other `model*.safetensors`.

The rest is left out with a warning. Where another loader would take another set and both have
tensors of the same names, nobody can tell which is meant, and the folder is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.files import CheckpointFile, read_json
from mlops.checkpoints.refusal import examples, refusal
from mlops.checkpoints.safetensors import read_header
from mlops.checkpoints.stand_ins import refuse_stand_ins
from mlops.errors import PackagingError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"^(model.*)-(\d{5,9})-of-(\d{5,9})\.safetensors$")
_MAX_SHARDS = 10_000


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one model.

    Attributes:
        names: sorted, relative to the folder.
        weight_map: from tensor to file, as the index says; empty without an index.
        stale_map: the same of an index that names other files than there are.
        rivals: files that another loader would take instead.
        others: all further weight files beside them, `rivals` included.
    """

    names: tuple[str, ...]
    weight_map: Mapping[str, str]
    stale_map: Mapping[str, str]
    rivals: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def with_index(self) -> tuple[str, ...]:
        """The weight files and their index."""
        return (*self.names, INDEX) if self.weight_map else self.names

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of what was not chosen."""
        warnings = []
        if self.stale_map:
            warnings.append(
                f"no weight file that {INDEX} names "
                f"({examples(sorted(set(self.stale_map.values())), 1)}) is there, and the others "
                "are whole: it is of another build and is left out"
            )
        if self.others:
            source = f"those that {INDEX} names" if self.weight_map else examples(list(self.names))
            warnings.append(f"{examples(list(self.others))} left out: the weights are {source}")
        if len(self.names) > 1 and not self.weight_map and not _SHARD.match(self.names[0]):
            warnings.append(
                f"no index says which weights belong together: {examples(list(self.names))} are "
                "taken as parts of one model"
            )
        return tuple(warnings)


def choose_weight_files(path: Path, files: Mapping[str, CheckpointFile]) -> WeightFiles:
    """Choose the set of weight files by names and index; no weight file is opened.

    Args:
        files: of the folder, by relative path.

    Raises:
        PackagingError: there is none, it is not whole, or two sets have equal claims.
    """
    at_top = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    weight_map = _read_index(path, files)
    named = set(weight_map.values())
    is_stale = bool(named) and not named & set(at_top) and not any("/" in name for name in named)
    if named and not is_stale:
        for name in sorted(named):
            if name not in files or not name.endswith(".safetensors"):
                raise missing_weight_file(path, name[:200])
        chosen = sorted(named)
        rivals = [SINGLE] if SINGLE in at_top and SINGLE not in named else []
    else:
        chosen, rivals = _without_index(path, at_top)
    return WeightFiles(
        names=tuple(chosen),
        weight_map={} if is_stale else weight_map,
        stale_map=weight_map if is_stale else {},
        rivals=tuple(rivals),
        others=tuple(name for name in at_top if name not in chosen),
    )


def check_against_index(
    path: Path, weights: WeightFiles, tensors: Mapping[str, TensorInfo]
) -> None:
    """Raise `PackagingError` unless index and files name the same tensors in the same places."""
    placed = {name: tensor.file for name, tensor in tensors.items()}
    wrong = sorted(name for name, file in weights.weight_map.items() if placed.get(name) != file)
    if wrong:
        raise refusal(
            f"tensors that {INDEX} names are not in their files: {examples(wrong)}; copy or "
            "download the weights again",
            path,
            tensors=wrong[:10],
        )
    if set(placed) < set(weights.stale_map):
        missing = sorted(set(weights.stale_map) - set(placed))
        raise missing_weight_file(path, weights.stale_map[missing[0]][:200])


def refuse_rivals(
    path: Path,
    files: Mapping[str, CheckpointFile],
    weights: WeightFiles,
    tensors: Mapping[str, TensorInfo],
) -> None:
    """Raise `PackagingError` when another set of weights could as well be the model.

    One that cannot be read could not; it is left out with the others.
    """
    for name in weights.rivals:
        if not _names_of_tensors(files, name).isdisjoint(tensors):
            raise refusal(
                f"{path} holds two sets of weights, {name} and {examples(list(weights.names))}, "
                "and nothing says which is the model; move one of them elsewhere",
                path,
                files=[name, *weights.names][:10],
            )


def missing_weight_file(path: Path, name: str) -> Exception:
    """The error for a weight file that an index or the other files' numbering asks for."""
    return refusal(
        f"the weight file {examples([name])} is missing from {path}; copy or download it again",
        path,
        file=name,
    )


def _read_index(path: Path, files: Mapping[str, CheckpointFile]) -> dict[str, str]:
    if INDEX not in files:
        return {}
    refuse_stand_ins(path, [files[INDEX]])
    weight_map: Any = read_json(files[INDEX]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise refusal(f"{INDEX} in {path} has no weight_map", path, file=INDEX)
    return weight_map


def _without_index(path: Path, at_top: list[str]) -> tuple[list[str], list[str]]:
    """The chosen files, and those that another loader would take."""
    names = [name for name in at_top if name.startswith("model")]
    if not names:
        raise _refuse_other_names(path, at_top)
    shards: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if match := _SHARD.match(name):
            shards.setdefault((match[1], match[3]), []).append(name)
    own = {key: group for key, group in shards.items() if key[0] == "model"}
    if SINGLE in names:
        return [SINGLE], [name for group in own.values() for name in group]
    sets = own or shards
    if len(sets) > 1:
        first = [group[0] for group in sets.values()]
        raise refusal(
            f"{path} holds shards of {len(sets)} sets of weights, such as {examples(first)}, and "
            f"no {INDEX} that says which is the model; move the others elsewhere",
            path,
            files=first[:10],
        )
    for prefix, total in sets:
        for number in range(1, min(int(total), _MAX_SHARDS) + 1):
            wanted = f"{prefix}-{number:0{len(total)}}-of-{total}.safetensors"
            if wanted not in names:
                raise missing_weight_file(path, wanted)
    return next(iter(sets.values()), names), []


def _refuse_other_names(path: Path, names: list[str]) -> Exception:
    if any(name.startswith("consolidated") for name in names):
        return refusal(
            f"{path} has its weights in Mistral's own format ({examples(names)}), which is not "
            "read; download the same model's model*.safetensors and config.json",
            path,
            files=names[:10],
        )
    return refusal(
        f"{path} has {examples(names)}, but weights are read from model*.safetensors; rename the "
        "file",
        path,
        files=names[:10],
    )


def _names_of_tensors(files: Mapping[str, CheckpointFile], name: str) -> set[str]:
    try:
        return set(read_header(files[name].path, name).tensors)
    except PackagingError:
        return set()
