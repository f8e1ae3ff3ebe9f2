"""Adapters of a mixture's experts, whose matrices mlx-lm holds stacked: (experts, out, in).

    model.layers.0.mlp.experts.3.gate_proj     A and B of one expert: PEFT on a module for each
    model.layers.0.mlp.experts.down_projs.3    likewise, over a 4-bit gpt-oss of Unsloth's
    model.layers.0.mlp.experts.gate_up_proj    of all at once: PEFT's `target_parameters`
    model.layers.0.mlp.switch_mlp.gate_proj    stacked: mlx-lm

A layer has one block of experts, whatever it is called, so the layer and what the linear does there
tell which one of the model's is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops.checkpoints.checkpoint import AdapterModule, Checkpoint, Part, Update
from mlops.checkpoints.refusal import examples, refusal
from mlops.checkpoints.tensors import WeightShapes
from mlops.counts import count
from mlops.errors import PackagingError

_ROLES = {
    "gate_proj": "gate", "w1": "gate",
    "up_proj": "up", "w3": "up", "fc1": "up",
    "down_proj": "down", "w2": "down", "fc2": "down", "output_linear": "down",
    "gate_up_proj": "gate_up", "input_linear": "gate_up",
    "gate_up_projs": "gate_up", "down_projs": "down",
}  # fmt: skip
_BLOCKS = frozenset({"experts", "switch_mlp", "switch_glu", "moe", "block_sparse_moe"})
_LAYERS = frozenset({"layers", "h", "blocks"})
_NESTED = ".base_layer"
_PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "weight")
"""Parameters that `target_parameters` may mean, in the order in which modules define them."""


INTERLEAVED = frozenset({"gpt_oss"})
"""Architectures whose `gate_up_proj` has gate and up in turn; elsewhere gate is the first half."""


@dataclass(frozen=True)
class _Location:
    """Which linear of the experts a name means.

    Attributes:
        path: of the layer, as it was written: `model.layers.0`.
        role: `gate`, `up`, `down`, or `gate_up` for both in one.
        expert: the number of a single one, else None.
    """

    path: str
    role: str
    expert: int | None

    @property
    def layer(self) -> str:
        """`layers.0`: loaders add and drop what stands before it."""
        return ".".join(self.path.split(".")[-2:])


def _locate(name: str) -> _Location | None:
    *parents, leaf = name.split(".")
    expert = None
    if parents and _is_number(leaf):  # a list of linears: experts.down_projs.3
        expert, leaf = int(leaf), parents.pop()
    elif parents and _is_number(parents[-1]):
        expert = int(parents.pop())
    role = _ROLES.get(leaf)
    is_block = bool(parents) and (
        parents[-1] in _BLOCKS or (expert is not None and parents[-1] == "mlp")
    )
    if role is None or not is_block:
        return None
    for place in range(len(parents) - 1, 0, -1):
        if parents[place - 1] in _LAYERS and _is_number(parents[place]):
            return _Location(".".join(parents[: place + 1]), role, expert)
    return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 6


@dataclass(frozen=True)
class ExpertLinear:
    """One of the linears of a block of experts of the base model.

    Attributes:
        name: of the module, or of the tensors that it is made of.
        num_out: values that an expert gives; None when unknown.
        num_in: values that it takes; several when only the model can tell, () when unknown.
    """

    name: str
    num_experts: int
    num_out: int | None = None
    num_in: tuple[int, ...] = ()

    def fits(self, num_in: int, num_out: int) -> bool:
        """False when the shape is known to be another one."""
        return (not self.num_in or num_in in self.num_in) and self.num_out in (None, num_out)


class ExpertLinears:
    """The linears of all blocks of experts of one base model."""

    def __init__(self, linears: Iterable[ExpertLinear]) -> None:
        self._by_layer: dict[tuple[str, str], list[tuple[str, ExpertLinear]]] = {}
        for linear in linears:
            if location := _locate(linear.name):
                found = self._by_layer.setdefault((location.layer, location.role), [])
                found.append((location.path, linear))

    def find(self, name: str) -> list[ExpertLinear]:
        """Those that a module of this name changes: none, one, or gate and up."""
        location = _locate(name)
        if location is None:
            return []
        roles = ("gate", "up") if location.role == "gate_up" else (location.role,)
        found = [self._find(location, role) for role in roles]
        return [linear for linear in found if linear is not None]

    def _find(self, location: _Location, role: str) -> ExpertLinear | None:
        candidates = self._by_layer.get((location.layer, role), [])
        same = [linear for path, linear in candidates if path == location.path]
        only = [linear for _, linear in candidates] if len(candidates) == 1 else []
        return next(iter(same or only), None)


def stored_expert_linears(base: Checkpoint) -> ExpertLinears:
    """The linears of the experts of a checkpoint, told from its headers."""
    shapes = WeightShapes(base.tensors, base.config)
    stacked: dict[str, ExpertLinear] = {}
    single: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for tensor, info in base.tensors.items():
        name = tensor.removesuffix(".weight").removesuffix("_blocks")
        location = _locate(name)
        if location is None or not info.shape:
            continue
        if location.expert is not None and tensor.endswith(".weight"):
            found = single.setdefault((location.path, location.role), [])
            found.append((location.expert, name))
        elif len(info.shape) < 3:
            continue  # a layer without a mixture, or biases
        elif location.role == "gate_up":
            # Its halves may lie along either axis: the loader knows.
            for leaf in ("gate_proj", "up_proj"):
                half = f"{name.rpartition('.')[0]}.{leaf}"
                stacked[half] = ExpertLinear(half, info.shape[0])
        elif tensor.endswith(".weight") and len(shapes.leading(name)) == 2:
            num_experts, num_out = shapes.leading(name)
            columns = tuple(shapes.possible_columns(name))
            stacked[name] = ExpertLinear(name, num_experts, num_out, columns)
        else:
            stacked[name] = ExpertLinear(name, info.shape[0])
    for experts in single.values():
        number, name = max(experts)
        leading = shapes.leading(name)
        columns = tuple(shapes.possible_columns(name))
        stacked[name] = ExpertLinear(name, number + 1, leading[0] if leading else None, columns)
    return ExpertLinears(stacked.values())


def read_parameters(
    path: Path,
    targets: Any,
    modules: Mapping[str, AdapterModule],
    rank_of: Callable[[str], Any],
    scale_of: Callable[[str, int], float],
) -> dict[str, AdapterModule]:
    """A PEFT adapter's modules with their scales, those that `target_parameters` mean as experts.

    PEFT wraps a module once for each parameter of it, the first one innermost (`base_layer`), and
    puts the matrices of all experts into one: A (experts * rank, in), B (out, rank * experts).

    Args:
        targets: ends of the names of parameters: `mlp.experts.gate_up_proj`.
        modules: by name; what lies side by side is still taken for rank.
        rank_of: the rank that the configuration has for a name.
        scale_of: the scale for a name and a rank.

    Raises:
        PackagingError: it has parameters that are no linears of experts.
    """
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise refusal(
            f"target_parameters of the adapter {path} is not a list of names: write out those "
            "that it was trained with",
            path,
            setting="target_parameters",
        )
    if unknown := [name for name in targets if name.rpartition(".")[2] not in _PARAMETERS]:
        raise refusal(
            f"the PEFT adapter {path} uses target_parameters with {examples(unknown)}; only "
            f"{', '.join(_PARAMETERS)} of experts are supported: merge it into its model with PEFT "
            "and package the result",
            path,
            setting="target_parameters",
        )
    wanted = frozenset(targets)
    deepest: dict[str, int] = {}
    for name in modules:
        owner = name.replace(_NESTED, "")
        deepest[owner] = max(name.count(_NESTED), deepest.get(owner, 0))
    found: dict[str, AdapterModule] = {}
    for name, module in modules.items():
        owner = name.replace(_NESTED, "")
        leaves = _targeted_parameters(owner, wanted)
        if not leaves:
            found[name] = replace(module, scale=scale_of(name, module.rank))
            continue
        if len(leaves) != deepest[owner] + 1:
            raise refusal(
                f"the adapter {path} has tensors for {count(deepest[owner] + 1, 'parameter')} of "
                f"{owner}, and target_parameters names {', '.join(leaves)}: write out those that "
                "it was trained with",
                path,
                setting="target_parameters",
            )
        parameter = f"{owner}.{leaves[deepest[owner] - name.count(_NESTED)]}"
        read = _read_parameter(path, parameter, module, rank_of(parameter), scale_of)
        if read.name != name and read.name in modules:
            raise refusal(
                f"the adapter {path} has {read.name} under two names; save it again with the one "
                "that was trained",
                path,
                tensors=[module.key_a, modules[read.name].key_a],
            )
        found[read.name] = read
    return found


def _targeted_parameters(owner: str, targets: Set[str]) -> list[str]:
    """Which parameters of a module are meant, the one that PEFT wraps first in front."""
    parts = owner.split(".")
    ends = [".".join([*parts[start:], ""]) for start in range(len(parts) + 1)]
    return [leaf for leaf in _PARAMETERS if any(f"{end}{leaf}" in targets for end in ends)]


def _read_parameter(
    path: Path,
    parameter: str,
    module: AdapterModule,
    rank: Any,
    scale_of: Callable[[str, int], float],
) -> AdapterModule:
    name = parameter.removesuffix(".weight")
    if not isinstance(rank, int) or rank < 1 or module.rank % rank:
        raise refusal(
            f"the tensors of {name} in the adapter {path} have {count(module.rank, 'row')}, no "
            f"multiple of the rank {rank!r:.40} of its configuration: write the rank that it "
            "was trained with",
            path,
            tensors=[module.key_a, module.key_b],
        )
    num_experts = module.rank // rank
    is_matrix = name != parameter and num_experts == 1
    return replace(
        module,
        name=name,
        rank=rank,
        scale=scale_of(parameter, rank),
        num_experts=None if is_matrix else num_experts,
        is_side_by_side=not is_matrix,
    )


def place_experts(
    adapter: Checkpoint, linears: ExpertLinears, base: Checkpoint, operation: str
) -> tuple[list[Update], list[AdapterModule]]:
    """What an adapter does to the experts of its base, and its modules that are no experts.

    Args:
        linears: of the base.
        operation: what is being done; for errors.

    Raises:
        PackagingError: shapes or numbers of experts differ, or the experts have magnitudes.
    """
    modules = adapter.adapter.modules.values() if adapter.adapter else ()
    targets = {module.name: linears.find(module.name) for module in modules}
    placing = _Placing(adapter, base, operation)
    experts = [module for module in modules if targets[module.name]]
    is_reversed = placing.find_orientation(experts, targets)
    for module in experts:
        placing.check(module, targets[module.name])
        placing.add(module, targets[module.name], is_reversed and module.is_side_by_side)
    return placing.updates(), [module for module in modules if not targets[module.name]]


class _Placing:
    """The parts of an adapter, put together by the linear that they change."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint, operation: str) -> None:
        self._adapter = adapter
        self._base = base
        self._operation = operation
        self._linears: dict[str, ExpertLinear] = {}
        self._parts: dict[str, list[Part]] = {}

    def updates(self) -> list[Update]:
        return [
            Update(name, tuple(parts), self._linears[name].num_experts)
            for name, parts in self._parts.items()
        ]

    def find_orientation(
        self, modules: list[AdapterModule], targets: Mapping[str, list[ExpertLinear]]
    ) -> bool:
        """True when A has the outputs and B the inputs.

        Versions of PEFT differ in it, and architectures: the shapes tell. A square matrix has none;
        another one of the same adapter does.
        """
        parameters = [module for module in modules if module.is_side_by_side]
        possible = {False, True}
        for module in parameters:
            num_in, num_out = module.in_features, module.out_features
            fitting = {
                is_reversed
                for is_reversed, shape in ((False, (num_in, num_out)), (True, (num_out, num_in)))
                if _fits(targets[module.name], *shape)
            }
            if not possible & fitting:
                raise self._misfit(module, targets[module.name])
            possible &= fitting
        if len(possible) == 2 and any(targets[module.name][0].num_in for module in parameters):
            raise self._refusal(
                f"{parameters[0].name} of the adapter {self._adapter.path} is square: whether A "
                "has its inputs or its outputs depends on the version of PEFT; merge it into its "
                "model with the one that it was trained with and package the result",
                parameters[0],
            )
        return possible == {True}

    def check(self, module: AdapterModule, targets: list[ExpertLinear]) -> None:
        """Refuse what no expert takes."""
        if module.key_m is not None:
            raise self._refusal(
                f"the adapter {self._adapter.path} has DoRA magnitudes for {module.name}, whose "
                "experts take LoRA only; merge it into its model with PEFT and package the result",
                module,
            )
        num_experts = targets[0].num_experts
        expert = _expert(module.name)
        if expert is not None and expert >= num_experts:
            raise self._other_base(module, f"the base has {count(num_experts, 'expert')}")
        if module.num_experts not in (None, num_experts):
            raise self._other_base(
                module, f"it is for {module.num_experts} experts, the base has {num_experts}"
            )

    def add(self, module: AdapterModule, linears: list[ExpertLinear], is_reversed: bool) -> None:
        """One expert's tensors or all of theirs; gate and up in one lie half and half, or in turn.

        Args:
            is_reversed: A has the outputs and B the inputs.
        """
        num_in, num_out = module.in_features, module.out_features
        if is_reversed:
            num_in, num_out = num_out, num_in
        if not _fits(linears, num_in, num_out):
            raise self._misfit(module, linears)
        for number, linear in enumerate(linears):
            outputs = None
            if len(linears) == 2 and self._base.architecture in INTERLEAVED:
                outputs = slice(number, num_out, 2)
            elif len(linears) == 2:
                outputs = slice(number * num_out // 2, (number + 1) * num_out // 2)
            self._append(linear, Part(module, _expert(module.name), outputs, is_reversed))

    def _append(self, linear: ExpertLinear, part: Part) -> None:
        parts = self._parts.setdefault(linear.name, [])
        if any(part.expert is None or other.expert in (part.expert, None) for other in parts):
            raise self._refusal(
                f"the adapter {self._adapter.path} has {part.module.name} under two names",
                part.module,
            )
        self._linears[linear.name] = linear
        parts.append(part)

    def _misfit(self, module: AdapterModule, linears: list[ExpertLinear]) -> PackagingError:
        num_out = sum(linear.num_out or 0 for linear in linears)
        columns = linears[0].num_in[0] if linears[0].num_in else "?"
        return self._other_base(
            module,
            f"it takes {module.in_features} and gives {module.out_features} values, but an expert "
            f"of the base takes {columns} and gives {num_out}",
        )

    def _other_base(self, module: AdapterModule, why: str) -> PackagingError:
        return self._refusal(
            f"the adapter {self._adapter.path} belongs to another base model than "
            f"{self._base.path}: {module.key_a}: {why}",
            module,
        )

    def _refusal(self, message: str, module: AdapterModule) -> PackagingError:
        return refusal(
            message,
            self._adapter.path,
            self._operation,
            base=str(self._base.path),
            module=module.name,
            tensors=[module.key_a],
        )


def _expert(name: str) -> int | None:
    location = _locate(name)
    return location.expert if location else None


def _fits(linears: list[ExpertLinear], num_in: int, num_out: int) -> bool:
    """Whether all of them together can take and give so many values."""
    share, rest = divmod(num_out, len(linears))
    return not rest and all(linear.fits(num_in, share) for linear in linears)
