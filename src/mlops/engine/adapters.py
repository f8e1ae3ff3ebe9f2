"""Adapters at run time: several stay in memory over one base model, and a request names one.

An adapter is a set of layers that wrap layers of the base. To use it, its layers take their places
in the model while the generation runs; afterwards the base layers are back. So nothing is loaded
again or fused, and without an adapter the model is exactly the one that was loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from mlops.errors import AdapterNotFoundError, PackagingError

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn


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
class _Swap:
    """One place of the model with its base layer and the adapted one."""

    place: _Place
    base: nn.Module
    adapted: nn.Module


class ResidentAdapters:
    """The adapters of one loaded model. Use it in the owner thread only."""

    def __init__(self, model: nn.Module, base: Checkpoint) -> None:
        self._model = model
        self._base = base
        self._swaps: dict[str, list[_Swap]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a request may use, in the order of loading."""
        return tuple(self._swaps)

    def load(self, name: str, adapter: Checkpoint) -> None:
        """Read an adapter's tensors and keep them under `name`.

        Raises:
            PackagingError: it belongs to another base model, a tensor of it would go unused, or
                it changes nothing.
        """
        import mlx.core as mx

        info = adapter.adapter
        if info is None:
            raise PackagingError(
                f"{adapter.path} is {adapter.description}, not an adapter",
                "load_adapter",
                {"path": str(adapter.path), "adapter": name},
            )
        check_adapter_fits(adapter, self._base)
        if adapter_delta_is_zero(adapter):
            raise PackagingError(
                f"the adapter {adapter.path} changes nothing: all its B matrices are zero; "
                "train it first",
                "load_adapter",
                {"path": str(adapter.path), "adapter": name},
            )
        swaps = self._read(adapter.path, info)
        mx.eval([swap.adapted.parameters() for swap in swaps])
        self._swaps[name] = swaps

    @contextmanager
    def applied(self, name: str | None) -> Iterator[None]:
        """Run the block with the adapter in the model; None is the base model.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        swaps = [] if name is None else self._find(name)
        try:
            for swap in swaps:
                swap.place.put(swap.adapted)
            yield
        finally:
            for swap in swaps:
                swap.place.put(swap.base)

    def check(self, name: str | None) -> None:
        """Raise `AdapterNotFoundError` unless the adapter is here; None is the base model."""
        if name is not None:
            self._find(name)

    def _find(self, name: str) -> list[_Swap]:
        if name not in self._swaps:
            known = ", ".join(map(repr, self._swaps)) or "none"
            raise AdapterNotFoundError(
                f"there is no adapter {name[:100]!r}; this model has {known}, "
                'and "base" for no adapter'
            )
        return self._swaps[name]

    def _read(self, path: Path, info: AdapterInfo) -> list[_Swap]:
        from mlops.engine.adapted_layers import wrap_layer

        tensors = _load_tensors(info)
        swaps = []
        for module in info.modules.values():
            place = self._find_place(path, module.name)
            base = place.layer
            swaps.append(_Swap(place, base, wrap_layer(module.name, base, _take(tensors, module))))
        if unused := sorted(set().union(*tensors.values())):
            raise PackagingError(
                f"the adapter {path} has {len(unused)} tensors that nothing uses: "
                f"{', '.join(unused[:3])}",
                "load_adapter",
                {"path": str(path), "tensors": unused[:3]},
            )
        return swaps

    def _find_place(self, path: Path, name: str) -> _Place:
        *parents, key = name.split(".")
        parent: Any = self._model
        try:
            for part in parents:
                parent = _Place(parent, part).layer
            place = _Place(parent, key)
            place.layer  # noqa: B018 - the look-up is the check
        except (AttributeError, IndexError, ValueError) as exc:
            raise PackagingError(
                f"the adapter {path} changes {name}, which the base model {self._base.path} does "
                "not have: it was trained on another base",
                "load_adapter",
                {"path": str(path), "module": name},
            ) from exc
        return place


def _load_tensors(info: AdapterInfo) -> dict[Path, dict[str, mx.array]]:
    import mlx.core as mx

    files = {module.file for module in info.modules.values()}
    return {file: cast("dict[str, mx.array]", mx.load(str(file))) for file in sorted(files)}


def _take(tensors: Mapping[Path, dict[str, mx.array]], module: AdapterModule) -> Any:
    """Take one module's tensors out of those of its file."""
    import mlx.core as mx

    from mlops.engine.adapted_layers import AdapterTensors

    of_file = tensors[module.file]
    a = of_file.pop(module.key_a).astype(mx.float32)
    b = of_file.pop(module.key_b).astype(mx.float32) * module.scale
    magnitude = None
    if module.key_m is not None:
        magnitude = of_file.pop(module.key_m).astype(mx.float32).reshape(-1)
    if module.transposed and module.num_experts is None:
        a, b = mx.contiguous(a.T), mx.contiguous(b.T)
    return AdapterTensors(a, b, magnitude)
