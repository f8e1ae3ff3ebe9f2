"""The adapters that are in memory: read, checked and written into the layers that use them.

An adapter has a slot, a number that rows of a batch are labelled with; 0 is the base model. Its
tensors lie at one position of the bank for its rank (`layers`). The engine decides when an adapter
is loaded and unloaded (`residency`), between two steps, and says before each forward pass which
slots the rows have.

Owner thread only, but for `num_bytes`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlops.checkpoints import (
    AdapterInfo,
    BaseModules,
    Checkpoint,
    ExpertLinear,
    ExpertLinears,
    ModuleNames,
    Part,
    Update,
    adapter_delta_is_zero,
    updates_in_base,
)
from mlops.counts import count
from mlops.errors import PackagingError

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

    from mlops.engine.layers import (
        AdapterTensors,
        Address,
        Banked,
        BankedEmbedding,
        PositionTensors,
        RowSlots,
    )

ORDINARY = 10.0
"""Of A and B, with the scale: trained ones have 0.01 to 1. Smaller ones overflow no float32."""

SMALLEST_RANK = 4
"""Ranks are padded up to this or a power of two, so that few banks serve all adapters."""


@dataclass(frozen=True)
class _Place:
    """Where a layer sits in the model: an item of a list, or an attribute of a module."""

    parent: Any
    key: str

    @property
    def layer(self) -> nn.Module:
        if isinstance(self.parent, list):
            return self.parent[int(self.key)]
        return getattr(self.parent, self.key)

    def put(self, layer: nn.Module) -> None:
        if isinstance(self.parent, list):
            self.parent[int(self.key)] = layer
        else:
            setattr(self.parent, self.key, layer)


@dataclass(frozen=True)
class _Resident:
    """One adapter in memory: where its tensors lie, in which modules, and its largest value."""

    address: Address
    modules: tuple[str, ...]
    largest: float


class AdapterBanks:
    """The adapters of one loaded model.

    Args:
        device: `"cpu"` or `"gpu"`. Banks are float32 on a CPU, whose `gather_mm` knows nothing
            else, and of the type that each layer computes in on a GPU.
    """

    def __init__(self, model: nn.Module, base: Checkpoint, device: str) -> None:
        import mlx.core as mx

        from mlops.engine.layers import InUse, compute_dtype

        self._model = model
        self._base = base
        self._modules = _modules_of(model)
        self._dtypes: dict[str, mx.Dtype] = {
            name: mx.float32 if device == "cpu" else compute_dtype(layer)
            for name, layer in model.named_modules()
        }
        self._in_use = InUse()
        self._layers: dict[str, Banked] = {}
        self._residents: dict[int, _Resident] = {}

    @property
    def num_resident_bytes(self) -> int:
        """Bytes of all banks, the positions that are free among them."""
        return sum(
            array.nbytes
            for layer in self._layers.values()
            for bank in layer.banks.by_rank.values()
            for array in bank.arrays
        )

    def num_bytes(self, adapter: Checkpoint) -> int:
        """Bytes of one position in the banks for this adapter, told from headers alone.

        Any thread may ask.

        Raises:
            PackagingError: it is not an adapter, or does not fit the model.
        """
        updates = updates_in_base(adapter, self._base, self._modules)
        rank = _bank_rank(updates)
        num_bytes = 0
        for update in updates:
            num_columns = (update.num_experts or 1) * (update.in_features + update.out_features)
            num_bytes += self._dtypes[update.place].size * rank * num_columns
            if update.key_m is not None:
                num_bytes += 4 * math.prod(adapter.tensors[update.key_m].shape)
        return num_bytes

    def check(self, adapter: Checkpoint) -> tuple[list[Update], dict[str, AdapterTensors]]:
        """Check all but values: every tensor has its place in the model, and the model uses it.

        Returns:
            What the adapter does to each module, and the tensors for it by the update's name, not
            evaluated. The layers have room for adapters from now on.

        Raises:
            PackagingError: it does not fit the base model, a tensor of it would go unused, or the
                model's code has no place for it.
        """
        updates = updates_in_base(adapter, self._base, self._modules)
        tensors = self._read(adapter, updates)
        self._wrap(adapter.path, updates)
        return updates, tensors

    def load(self, name: str, adapter: Checkpoint) -> int:
        """Read an adapter's tensors into the banks; returns its slot, 1 or more.

        After an error everything is as before.

        Args:
            name: what requests call it; for messages.

        Raises:
            PackagingError: it does not fit the base model, a tensor of it would go unused or is not
                finite, it changes nothing, or the model's code has no place for it.
        """
        info = _info(adapter)
        updates, tensors = self.check(adapter)
        if adapter_delta_is_zero(adapter):
            raise _refusal(
                f"the adapter {adapter.path} changes nothing: all its B matrices are zero; "
                "train it first",
                adapter.path,
                adapter=name,
            )
        rank = _bank_rank(updates)
        prepared, largest = self._prepare(adapter.path, rank, updates, tensors)
        address = self._free_address(rank)
        for module, written in prepared.items():
            self._layers[module].banks.write(rank, address.position, written)
        for module, written in prepared.items():
            bank = self._layers[module].banks.by_rank[rank]
            bank.touching.add(address.position)
            if written.excess is not None:
                bank.dora.add(address.position)
            if info.format == "peft":
                # PEFT changes what an embedding gives for ids, and not the output layer tied to
                # it; mlx-lm changes both.
                bank.input_only.add(address.position)
        slot = next(number for number in itertools.count(1) if number not in self._residents)
        self._residents[slot] = _Resident(address, tuple(prepared), largest)
        return slot

    def try_out(self, slot: int, adapter: Checkpoint) -> None:
        """Compute a few tokens with an adapter that was just loaded; unload it when that fails.

        Nothing is computed for one with ordinary values: that may take longer than to load it, and
        all rows wait. In float16, values that are ordinary can be too large together.

        Raises:
            PackagingError: its logits are not finite, though its tensors are: its scale is absurd.
        """
        from mlops.engine.finite import gives_finite_logits

        if self._residents[slot].largest <= ORDINARY and "F16" not in self._base.dtypes:
            return
        rows = self._in_use.rows
        self.use(self.select([slot]))
        is_fine = False
        try:
            is_fine = gives_finite_logits(self._model)
        finally:
            self.use(rows)
            if not is_fine:
                self.unload(slot)
        if not is_fine:
            raise _refusal(
                f"with the adapter {adapter.path} the model's logits are not finite: its weights "
                "or its scale are too large; train it again, or correct the scale or alpha in "
                "adapter_config.json",
                adapter.path,
            )

    def unload(self, slot: int) -> None:
        """Free a slot. No row of a batch may have it, nor may any `RowSlots` that is used again."""
        resident = self._residents.pop(slot)
        for module in resident.modules:
            bank = self._layers[module].banks.by_rank[resident.address.rank]
            bank.touching.discard(resident.address.position)
            bank.dora.discard(resident.address.position)
            bank.input_only.discard(resident.address.position)
        rank = resident.address.rank
        if all(other.address.rank != rank for other in self._residents.values()):
            # Else every rank that was ever used would go on taking memory.
            for layer in self._layers.values():
                layer.banks.by_rank.pop(rank, None)

    def select(self, slots: Sequence[int]) -> RowSlots | None:
        """What `use` needs for a batch with these slots, one for each row; None if all are 0."""
        from mlops.engine.layers import RowSlots

        if not any(slots):
            return None
        return RowSlots([self._residents[slot].address if slot else None for slot in slots])

    def use(self, rows: RowSlots | None) -> None:
        """Say which slots the rows of the next forward passes have; None is the base model."""
        self._in_use.rows = rows

    def _free_address(self, rank: int) -> Address:
        from mlops.engine.layers import Address

        taken = {resident.address for resident in self._residents.values()}
        addresses = (Address(rank, position) for position in itertools.count(1))
        return next(address for address in addresses if address not in taken)

    def _read(self, adapter: Checkpoint, updates: Iterable[Update]) -> dict[str, AdapterTensors]:
        """Every module's tensors, checked against the model's layers, not yet evaluated."""
        from mlops.engine.layers import check_tensors

        path, of_files = adapter.path, _load_tensors(adapter.path, _info(adapter))
        found = {}
        for update in updates:
            found[update.name] = tensors = _take(of_files, update)
            is_output = update.embedding is not None
            check_tensors(update.name, self._find_base(update.place), tensors, is_output)
        # What recognition has seen has its module, or is the same as what has.
        if unused := sorted(set().union(*of_files.values()) - set(adapter.tensors)):
            raise _refusal(
                f"the adapter {path} has {count(len(unused), 'tensor')} that nothing uses: "
                f"{', '.join(unused[:3])}",
                path,
                tensors=unused[:3],
            )
        return found

    def _prepare(
        self,
        path: Path,
        rank: int,
        updates: Iterable[Update],
        tensors: Mapping[str, AdapterTensors],
    ) -> tuple[dict[str, PositionTensors], float]:
        """What is written for each module, evaluated, so that nothing can fail halfway.

        Returns:
            That, and its largest value.
        """
        import mlx.core as mx

        prepared, is_finite, largest = {}, {}, []
        for update in updates:
            name, dtype = update.name, self._dtypes[update.place]
            prepared[name] = written = self._layers[name].prepare(tensors[name], rank, dtype)
            is_finite[name] = [mx.isfinite(array).all() for array in written.arrays]
            largest += [mx.abs(array).max() for array in written.arrays]
        mx.eval(is_finite, largest)  # all at once: to wait for each takes longer than to compute it
        for name, found in is_finite.items():
            if not all(found):
                raise _refusal(
                    f"the adapter {path} has values for {name} that are not finite, or too large "
                    "with its scale: it cannot be computed with",
                    path,
                    module=name,
                )
        return prepared, float(mx.stack(largest).max())

    def _find_base(self, name: str) -> nn.Module:
        """The base model's layer of this name."""
        layer = self._layers.get(name)
        return self._find_place(name).layer if layer is None else layer.base

    def _find_place(self, name: str) -> _Place:
        """Where a module of the model sits, by its name there."""
        *parents, key = name.split(".")
        parent: Any = self._model
        for part in parents:
            parent = _Place(parent, part).layer
        return _Place(parent, key)

    def _wrap(self, path: Path, updates: Iterable[Update]) -> None:
        """Make the layers that are not yet so able to take adapters. On their own they change
        nothing, so they stay when the adapter is refused later."""
        blocks, single, outputs = set(), set(), {}
        for update in updates:
            if update.name in self._layers:
                continue
            if update.embedding is not None:
                outputs[update.name] = update.embedding
            elif _is_switch(self._find_base(update.name)):
                blocks.add(self._block_of(path, update.name))
            else:
                single.add(update.name)
        single |= set(outputs.values()) - self._layers.keys()
        self._try_out(path, {*single, *blocks, *outputs.values()}, set(outputs.values()))
        for name in single:
            self._wrap_layer(name)
        for name in blocks:
            self._wrap_experts(name)
        for name, embedding in outputs.items():
            self._layers[name] = cast("BankedEmbedding", self._layers[embedding]).output

    def _wrap_layer(self, name: str) -> None:
        from mlops.engine.layers import make_banked

        place = self._find_place(name)
        layer = make_banked(place.layer, self._in_use)
        place.put(layer)
        self._layers[name] = layer

    def _wrap_experts(self, name: str) -> None:
        from mlops.engine.layers import BankedExperts

        place = self._find_place(name)
        block = BankedExperts(place.layer, self._in_use)
        place.put(block)
        self._layers |= {f"{name}.{key}": linear for key, linear in block.linears.items()}

    def _block_of(self, path: Path, name: str) -> str:
        from mlops.engine.mlx_lm import SwitchGLU, SwitchMLP

        block, _, _ = name.rpartition(".")
        if not isinstance(self._find_place(block).layer, SwitchGLU | SwitchMLP):
            raise _refusal(
                f"the adapter {path} changes the experts {name}, which are in no block of experts "
                "that takes adapters; fuse the adapter into its model",
                path,
                module=name,
            )
        return block

    def _try_out(self, path: Path, names: Collection[str], outputs: Collection[str]) -> None:
        """Refuse layers that the model uses in a way which adapters cannot follow, and `outputs`
        that it doesn't use as its output layer.

        A forward pass is laid out with witnesses in their places; lazily, so nothing is computed.
        """
        if not names:
            return
        from mlops.engine.witness import Witness, lay_out_forward_pass

        places = {name: self._find_place(name) for name in sorted(names)}
        witnesses = {name: Witness(place.layer, name in outputs) for name, place in places.items()}
        rows = self._in_use.rows
        try:
            self._in_use.rows = None
            for name, place in places.items():
                place.put(witnesses[name])
            num_rows, num_tokens = lay_out_forward_pass(self._model)
        finally:
            self._in_use.rows = rows
            for name, place in places.items():
                place.put(witnesses[name].base)
        for name, witness in witnesses.items():
            if problem := witness.problem(num_rows, num_tokens):
                raise _refusal(
                    f"the adapter {path} changes {name}, but mlx-lm's {self._base.architecture} "
                    f"{problem}: fuse the adapter into its model",
                    path,
                    module=name,
                )


def padded_rank(rank: int) -> int:
    """The rank of the bank for an adapter of this rank: 4, 8, 16, …"""
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length())


def _bank_rank(updates: Iterable[Update]) -> int:
    """The rank of the bank for an adapter that consists of these."""
    return padded_rank(max(update.rank for update in updates))


def _modules_of(model: nn.Module) -> BaseModules:
    """What adapters of this model may change."""
    from mlx import nn

    from mlops.engine.layers import weight_columns

    names, embeddings, experts = [], {}, []
    for name, layer in model.named_modules():
        names.append(name)
        if _is_switch(layer):
            dims = (layer.num_experts, layer.output_dims, (layer.input_dims,))
            experts.append(ExpertLinear(name, *dims))
        elif isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
            embeddings[name] = (layer.weight.shape[0], (weight_columns(layer),))
    return BaseModules(ModuleNames(names), embeddings, ExpertLinears(experts))


def _is_switch(layer: nn.Module) -> bool:
    from mlops.engine.mlx_lm import QuantizedSwitchLinear, SwitchLinear

    return isinstance(layer, SwitchLinear | QuantizedSwitchLinear)


def _info(adapter: Checkpoint) -> AdapterInfo:
    if adapter.adapter is None:
        raise _refusal(f"{adapter.path} is {adapter.description}, not an adapter", adapter.path)
    return adapter.adapter


def _load_tensors(path: Path, info: AdapterInfo) -> dict[Path, dict[str, mx.array]]:
    import mlx.core as mx

    files = {module.file for module in info.modules.values()}
    try:
        # The format is said: files of the hub's cache are called by their digest.
        return {
            file: cast("dict[str, mx.array]", mx.load(str(file), format="safetensors"))
            for file in sorted(files)
        }
    except (OSError, RuntimeError, ValueError) as exc:
        raise _refusal(f"the adapter {path} cannot be read: {exc}", path) from exc


def _take(tensors: Mapping[Path, Mapping[str, mx.array]], update: Update) -> AdapterTensors:
    """One module's tensors out of those of their files."""
    import mlx.core as mx

    from mlops.engine.layers import AdapterTensors

    of_parts = [_take_part(tensors[part.module.file], part) for part in update.parts]
    if update.parts[0].expert is None:
        (a, b), magnitude = of_parts[0], None
        if update.key_m is not None:
            of_file = tensors[update.parts[0].module.file]
            magnitude = of_file[update.key_m].astype(mx.float32).reshape(-1)
        return AdapterTensors(a, b, magnitude)
    own = {part.expert: matrices for part, matrices in zip(update.parts, of_parts, strict=True)}
    absent = (mx.zeros((0, update.in_features)), mx.zeros((update.out_features, 0)))
    stacks: tuple[list[mx.array], list[mx.array]] = [], []
    for expert in range(update.num_experts or 0):
        a, b = own.get(expert, absent)
        stacks[0].append(mx.pad(a, [(0, update.rank - a.shape[0]), (0, 0)]))
        stacks[1].append(mx.pad(b, [(0, 0), (0, update.rank - b.shape[1])]))
    return AdapterTensors(mx.stack(stacks[0]), mx.stack(stacks[1]))


def _take_part(tensors: Mapping[str, mx.array], part: Part) -> tuple[mx.array, mx.array]:
    """A and B of one part, float32 and with the scale in B: (in, rank) and (rank, out), or as
    stacked experts have them, (experts, rank, in) and (experts, out, rank); one expert's without
    their first axis."""
    import mlx.core as mx

    module = part.module
    a = tensors[module.key_a].astype(mx.float32)
    b = tensors[module.key_b].astype(mx.float32) * module.scale
    if module.is_side_by_side:
        a = a.reshape(module.num_experts, module.rank, -1)
        b = b.reshape(-1, module.rank, module.num_experts).transpose(2, 0, 1)
        if part.is_reversed:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    elif module.num_experts is None and module.transposed == (part.expert is None):
        a, b = a.T, b.T
    if part.outputs is not None:
        b = b[..., part.outputs, :]
    return a, b


def _refusal(message: str, path: Path, **details: Any) -> PackagingError:
    return PackagingError(message, "load_adapter", {"path": str(path), **details})
