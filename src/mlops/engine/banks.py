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
    AdapterModule,
    Checkpoint,
    adapter_delta_is_zero,
    check_adapter_fits,
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
        PositionTensors,
        RowSlots,
    )

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
    """One adapter in memory: where its tensors lie, and in which modules."""

    address: Address
    modules: tuple[str, ...]


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
            PackagingError: it is not an adapter, or the model has no such modules.
        """
        info = _info(adapter)
        rank = padded_rank(info.rank)
        num_bytes = 0
        for module in info.modules.values():
            num_columns = (module.num_experts or 1) * (module.in_features + module.out_features)
            if module.name not in self._dtypes:
                raise self._no_such_module(adapter.path, module.name)
            num_bytes += self._dtypes[module.name].size * rank * num_columns
            if module.key_m is not None:
                num_bytes += 4 * math.prod(adapter.tensors[module.key_m].shape)
        return num_bytes

    def load(self, name: str, adapter: Checkpoint) -> int:
        """Read an adapter's tensors into the banks; returns its slot, 1 or more.

        After an error everything is as before.

        Args:
            name: what requests call it; for messages.

        Raises:
            PackagingError: it belongs to another base model, a tensor of it would go unused or is
                not finite, it changes nothing, or the model's code has no place for it.
        """
        info = _info(adapter)
        check_adapter_fits(adapter, self._base)
        tensors = self._read(adapter.path, info)
        if adapter_delta_is_zero(adapter):
            raise _refusal(
                f"the adapter {adapter.path} changes nothing: all its B matrices are zero; "
                "train it first",
                adapter.path,
                adapter=name,
            )
        self._wrap(adapter.path, tensors)
        rank = padded_rank(info.rank)
        prepared = self._prepare(adapter.path, rank, tensors)
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
        self._residents[slot] = _Resident(address, tuple(prepared))
        return slot

    def try_out(self, slot: int, adapter: Checkpoint) -> None:
        """Compute a few tokens with an adapter that was just loaded; unload it when that fails.

        Raises:
            PackagingError: its logits are not finite, though its tensors are: its scale is absurd.
        """
        from mlops.engine.finite import gives_finite_logits

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

    def _read(self, path: Path, info: AdapterInfo) -> dict[str, AdapterTensors]:
        """Every module's tensors, checked against the model's layers, not yet evaluated."""
        from mlops.engine.layers import check_tensors

        of_files = _load_tensors(path, info)
        found = {}
        for module in info.modules.values():
            found[module.name] = _take(of_files, module)
            check_tensors(module.name, self._find_base(path, module.name), found[module.name])
        if unused := sorted(set().union(*of_files.values())):
            raise _refusal(
                f"the adapter {path} has {count(len(unused), 'tensor')} that nothing uses: "
                f"{', '.join(unused[:3])}",
                path,
                tensors=unused[:3],
            )
        return found

    def _prepare(
        self, path: Path, rank: int, tensors: Mapping[str, AdapterTensors]
    ) -> dict[str, PositionTensors]:
        """What is written for each module, evaluated, so that nothing can fail halfway."""
        import mlx.core as mx

        prepared = {}
        for name, own in tensors.items():
            written = self._layers[name].prepare(own, rank, self._dtypes[name])
            if not all(mx.isfinite(array).all().item() for array in written.arrays):
                raise _refusal(
                    f"the adapter {path} has values for {name} that are not finite, or too large "
                    "with its scale: it cannot be computed with",
                    path,
                    module=name,
                )
            prepared[name] = written
        return prepared

    def _find_base(self, path: Path, name: str) -> nn.Module:
        """The base model's layer of this name."""
        layer = self._layers.get(name)
        return self._find_place(path, name).layer if layer is None else layer.base

    def _find_place(self, path: Path, name: str) -> _Place:
        *parents, key = name.split(".")
        parent: Any = self._model
        try:
            for part in parents:
                parent = _Place(parent, part).layer
            place = _Place(parent, key)
            place.layer  # noqa: B018 - the look-up is the check
        except (AttributeError, IndexError, ValueError) as exc:
            raise self._no_such_module(path, name) from exc
        return place

    def _no_such_module(self, path: Path, name: str) -> PackagingError:
        return _refusal(
            f"the adapter {path} changes {name}, which the base model {self._base.path} does not "
            "have: it was trained on another base",
            path,
            module=name,
        )

    def _wrap(self, path: Path, names: Iterable[str]) -> None:
        """Make the layers that are not yet so able to take adapters. On their own they change
        nothing, so they stay when the adapter is refused later."""
        from mlops.engine.layers import BankedExperts, make_banked

        blocks, single = set(), []
        for name in names:
            if name in self._layers:
                continue
            if _is_switch(self._find_base(path, name)):
                blocks.add(self._block_of(path, name))
            else:
                single.append(name)
        self._try_out(path, {*single, *blocks})
        for name in single:
            place = self._find_place(path, name)
            layer = make_banked(place.layer, self._in_use)
            place.put(layer)
            self._layers[name] = layer
        for name in blocks:
            place = self._find_place(path, name)
            block = BankedExperts(place.layer, self._in_use)
            place.put(block)
            self._layers |= {f"{name}.{key}": linear for key, linear in block.linears.items()}

    def _block_of(self, path: Path, name: str) -> str:
        from mlops.engine.mlx_lm import SwitchGLU, SwitchMLP

        block, _, _ = name.rpartition(".")
        if not isinstance(self._find_place(path, block).layer, SwitchGLU | SwitchMLP):
            raise _refusal(
                f"the adapter {path} changes the experts {name}, which are in no block of experts "
                "that takes adapters; fuse the adapter into its model",
                path,
                module=name,
            )
        return block

    def _try_out(self, path: Path, names: Collection[str]) -> None:
        """Refuse layers that the model uses in a way which adapters cannot follow.

        A forward pass is laid out with witnesses in their places; lazily, so nothing is computed.
        """
        if not names:
            return
        from mlops.engine.witness import Witness, lay_out_forward_pass

        places = {name: self._find_place(path, name) for name in sorted(names)}
        witnesses = {name: Witness(place.layer) for name, place in places.items()}
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
        return {file: cast("dict[str, mx.array]", mx.load(str(file))) for file in sorted(files)}
    except (OSError, RuntimeError, ValueError) as exc:
        raise _refusal(f"the adapter {path} cannot be read: {exc}", path) from exc


def _take(tensors: Mapping[Path, dict[str, mx.array]], module: AdapterModule) -> AdapterTensors:
    """Take one module's tensors out of those of its file."""
    import mlx.core as mx

    from mlops.engine.layers import AdapterTensors

    of_file = tensors[module.file]
    a = of_file.pop(module.key_a).astype(mx.float32)
    b = of_file.pop(module.key_b).astype(mx.float32) * module.scale
    magnitude = None
    if module.key_m is not None:
        magnitude = of_file.pop(module.key_m).astype(mx.float32).reshape(-1)
    if module.transposed and module.num_experts is None:
        a, b = a.T, b.T
    return AdapterTensors(a, b, magnitude)


def _refusal(message: str, path: Path, **details: Any) -> PackagingError:
    return PackagingError(message, "load_adapter", {"path": str(path), **details})
