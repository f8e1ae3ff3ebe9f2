"""Layers that use adapters by row: rows of one batch may have different adapters, or none.

    LoRA (Hu et al., 2021):  y = W x + scale · B A x
    DoRA (Liu et al., 2024): y = m / |W + scale · B A| · (W x + scale · B A x), norms by output

A layer that some adapter touches is replaced, once and for good, by one that wraps it. Tensors of
adapters lie in banks, one for each (padded) rank; an adapter has the same position in all arrays of
its bank, and position 0 is zeros: it changes nothing. Before a forward pass `InUse.rows` says which
position each row has, and every layer adds

    gather_mm(gather_mm(x, Aᵀ, positions), Bᵀ, positions)

for the banks that its rows need. The scale is in B. DoRA's factor is kept less one, so that adding
`(factor - 1) · y` leaves the rows without DoRA as they are, bit for bit.

`banks` reads adapters and writes them into these layers.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
from mlx import nn

from mlops.counts import count
from mlops.engine.mlx_lm import QuantizedSwitchLinear, SwitchLinear
from mlops.errors import PackagingError

_WEIGHTS = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class AdapterTensors:
    """One adapter's tensors for one layer, float32, oriented as the formulas of mlx-lm have them.

    Attributes:
        a: (in, rank) for a linear, (rows, rank) for an embedding, (experts, rank, in) for experts.
        b: (rank, out), or (experts, out, rank); the scale is in it.
        magnitude: DoRA's m, (out,) for a linear and (rows,) for an embedding.
    """

    a: mx.array
    b: mx.array
    magnitude: mx.array | None = None


@dataclass(frozen=True)
class PositionTensors:
    """What one adapter writes at its position of a module's bank.

    Attributes:
        a: (rank, in) for a linear, (rows, rank) for an embedding, (experts, rank, in) for experts.
        b: (out, rank), or (experts, out, rank).
        excess: DoRA's factor less one, float32, (out,) for a linear and (rows,) for an embedding.
    """

    a: mx.array
    b: mx.array
    excess: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [self.a, self.b] + ([] if self.excess is None else [self.excess])


@dataclass(eq=False)
class ModuleBank:
    """One module's tensors of one bank, stacked by position.

    Attributes:
        a, b: as in `PositionTensors`, with the positions in front; position 0 is zeros.
        excess: likewise; None when no DoRA adapter was ever here.
        touching: positions of the adapters that change this module.
        dora: those of them that have an excess.
        input_only: those of them that leave an embedding's use as the output layer alone.
    """

    a: mx.array
    b: mx.array
    excess: mx.array | None = None
    touching: set[int] = field(default_factory=set)
    dora: set[int] = field(default_factory=set)
    input_only: set[int] = field(default_factory=set)

    @property
    def arrays(self) -> list[mx.array]:
        return [self.a, self.b] + ([] if self.excess is None else [self.excess])

    def write(self, position: int, tensors: PositionTensors) -> None:
        """Write one adapter's tensors. Nothing uses them until `touching` has the position.

        It is in place, unless the arrays have to grow: nothing else may hold them.
        """
        self.a = _with_position(self.a, position, tensors.a)
        self.b = _with_position(self.b, position, tensors.b)
        if tensors.excess is not None and self.excess is None:
            self.excess = mx.zeros((self.a.shape[0], *tensors.excess.shape))
        if self.excess is not None:
            # A position that had a DoRA adapter may now get a LoRA one.
            excess = tensors.excess if tensors.excess is not None else mx.zeros_like(self.excess[0])
            self.excess = _with_position(self.excess, position, excess)


def _with_position(stack: mx.array, position: int, value: mx.array) -> mx.array:
    """The stack with `value` at `position`; a little larger than needed, if it must grow."""
    capacity = stack.shape[0]
    if position >= capacity:
        # Small steps: a bank is large, and 64 adapters may take only 5% more than their files do.
        num_more = position + 1 + max(1, capacity // 32) - capacity
        more = mx.zeros((num_more, *stack.shape[1:]), dtype=stack.dtype)
        stack = mx.concatenate([stack, more])
        mx.eval(stack)
    stack[position : position + 1] = value.astype(stack.dtype)[None]
    mx.eval(stack)
    return stack


class ModuleBanks:
    """One module's tensors in all banks.

    Attributes:
        by_rank: by the bank's rank; only banks with an adapter that touches this module.
        num_experts: for stacked experts, else None.
    """

    def __init__(self, num_experts: int | None = None) -> None:
        self.by_rank: dict[int, ModuleBank] = {}
        self.num_experts = num_experts

    def write(self, rank: int, position: int, tensors: PositionTensors) -> None:
        """Write an adapter's tensors; a bank is made when it is the module's first of its rank."""
        bank = self.by_rank.get(rank)
        if bank is None:
            a, b = (mx.zeros((1, *array.shape), array.dtype) for array in (tensors.a, tensors.b))
            bank = ModuleBank(a, b)
        bank.write(position, tensors)
        self.by_rank[rank] = bank


@dataclass(frozen=True, order=True)
class Address:
    """Where an adapter's tensors lie, in every module that it touches."""

    rank: int
    position: int


@dataclass(frozen=True)
class Selected:
    """A bank that some row of the batch needs in one module.

    Attributes:
        indices: (rows,) uint32, each row's position; for stacked experts (distinct adapters of the
            batch,), the place of its position's first expert.
        has_dora: some row's adapter has an excess.
    """

    bank: ModuleBank
    indices: mx.array
    has_dora: bool

    @property
    def excess(self) -> mx.array | None:
        """The bank's, when it matters to some row."""
        return self.bank.excess if self.has_dora else None


class RowSlots:
    """The adapters of a batch's rows, and the index arrays that the layers need for them.

    Valid while none of these adapters is unloaded. Index arrays are made when a layer first asks.

    Args:
        addresses: one for each row; None is the base model.
    """

    def __init__(self, addresses: Sequence[Address | None]) -> None:
        self._addresses = tuple(addresses)
        self._distinct = tuple(dict.fromkeys(self._addresses))
        self._selected: dict[tuple[ModuleBanks, bool], tuple[Selected, ...]] = {}
        self._indices: dict[tuple[int, frozenset[int], int | None], mx.array] = {}
        self._positions: dict[int, frozenset[int]] = {}
        for address in sorted(filter(None, self._distinct)):
            others = self._positions.get(address.rank, frozenset())
            self._positions[address.rank] = others | {address.position}

    @property
    def num_rows(self) -> int:
        return len(self._addresses)

    @property
    def num_distinct(self) -> int:
        """Different adapters of the batch, the base model among them."""
        return len(self._distinct)

    @cached_property
    def ordinals(self) -> mx.array:
        """(rows,) uint32, each row's place among the distinct adapters of the batch."""
        places = {address: place for place, address in enumerate(self._distinct)}
        return mx.array([places[address] for address in self._addresses], dtype=mx.uint32)

    def select(self, module: ModuleBanks, as_output: bool = False) -> tuple[Selected, ...]:
        """The banks that some row needs in this module, by rank.

        Args:
            as_output: an embedding is used as the output layer.
        """
        selected = self._selected.get((module, as_output))
        if selected is None:
            selected = tuple(self._select(module, as_output))
            self._selected[module, as_output] = selected
        return selected

    def _select(self, module: ModuleBanks, as_output: bool) -> Iterator[Selected]:
        for rank, positions in self._positions.items():
            bank = module.by_rank.get(rank)
            if bank is None:
                continue
            touching = positions & bank.touching
            if as_output:
                touching -= bank.input_only
            if not touching:
                continue
            key = (rank, touching, module.num_experts)
            if key not in self._indices:
                self._indices[key] = self._make_indices(*key)
            yield Selected(bank, self._indices[key], not touching.isdisjoint(bank.dora))

    def _make_indices(
        self, rank: int, touching: frozenset[int], num_experts: int | None
    ) -> mx.array:
        """Positions, with 0 for every row that has no tensors in this module's bank."""
        addresses = self._addresses if num_experts is None else self._distinct
        places = [
            address.position if address and address.rank == rank and address.position in touching
            else 0
            for address in addresses
        ]  # fmt: skip
        return mx.array([place * (num_experts or 1) for place in places], dtype=mx.uint32)


@dataclass
class InUse:
    """What the next forward passes use; all layers of a model share it.

    Attributes:
        rows: of the batch; None when every row is the base model's.
    """

    rows: RowSlots | None = None

    def select(self, module: ModuleBanks, as_output: bool = False) -> tuple[Selected, ...]:
        return () if self.rows is None else self.rows.select(module, as_output)


class Banked(nn.Module):
    """A layer of the base model together with the adapters of it.

    Other attributes are the base layer's: models read `weight.dtype` and the like.
    """

    def __init__(self, base: nn.Module, in_use: InUse, num_experts: int | None = None) -> None:
        super().__init__()
        self.base = base
        self.in_use = in_use
        self.banks = ModuleBanks(num_experts)

    def __getattr__(self, key: str) -> object:
        if key in self:
            return self[key]
        if "base" not in self:
            raise AttributeError(key)
        return getattr(self["base"], key)

    def prepare(self, tensors: AdapterTensors, rank: int, dtype: mx.Dtype) -> PositionTensors:
        """Bring checked tensors into the shape that a bank of this rank holds."""
        raise NotImplementedError


class BankedLinear(Banked):
    """A linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.add(self.base(x), x)

    def add(self, y: mx.array, x: mx.array) -> mx.array:
        """What the base layer makes of x, y, with each row's own adapter."""
        for selected in self.in_use.select(self.banks):
            bank = selected.bank
            factors = (bank.a.swapaxes(-1, -2), bank.b.swapaxes(-1, -2))
            y = _add_delta(y, x, factors, selected.indices)
            if selected.excess is not None:
                # DoRA scales the weight, not the bias.
                weighed = y - self.base.bias if "bias" in self.base else y
                y = y + _times_row(weighed, selected.excess[selected.indices])
        return y

    def prepare(self, tensors: AdapterTensors, rank: int, dtype: mx.Dtype) -> PositionTensors:
        return PositionTensors(
            _pad(tensors.a.T, -2, rank).astype(dtype),
            _pad(tensors.b.T, -1, rank).astype(dtype),
            _dora_excess(tensors, self.base, lambda: (tensors.a @ tensors.b).T),
        )


class BankedEmbedding(Banked):
    """An embedding; `as_linear` serves tied output layers.

    Attributes:
        output: it as an output layer, for adapters that change that and nothing else.
    """

    def __init__(self, base: nn.Module, in_use: InUse) -> None:
        super().__init__(base, in_use)
        self.output = BankedLinear(base, in_use)

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        for selected in self.in_use.select(self.banks):
            bank, indices = selected.bank, selected.indices
            num_rows, rank = bank.a.shape[1:]
            places = indices[:, None] * num_rows + ids.reshape(indices.shape[0], -1)
            of_ids = bank.a.reshape(-1, rank)[places]
            y = _add_delta(y, of_ids, (bank.b.swapaxes(-1, -2),), indices)
            if selected.excess is not None:
                excess = selected.excess.reshape(-1)[places].reshape(*ids.shape, 1)
                y = y + excess.astype(y.dtype) * y
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.base.as_linear(x)
        for selected in self.in_use.select(self.banks, as_output=True):
            bank = selected.bank
            y = _add_delta(y, x, (bank.b, bank.a.swapaxes(-1, -2)), selected.indices)
            if selected.excess is not None:
                y = y + _times_row(y, selected.excess[selected.indices])
        return self.output.add(y, x)

    def prepare(self, tensors: AdapterTensors, rank: int, dtype: mx.Dtype) -> PositionTensors:
        return PositionTensors(
            _pad(tensors.a, -1, rank).astype(dtype),
            _pad(tensors.b.T, -1, rank).astype(dtype),
            _dora_excess(tensors, self.base, lambda: tensors.a @ tensors.b),
        )


class Routing:
    """What a block of experts tells its linears about the indices that it passes down.

    The block sorts its tokens by expert, so their rows are no longer known by their place. With
    adapters an index is therefore `expert * rows.num_distinct + ordinal of the row's adapter`:
    sorting by it sorts by expert still.
    """

    def __init__(self) -> None:
        self.rows: RowSlots | None = None
        self.modules: dict[str, ModuleBanks] = {}
        self._split: tuple[mx.array, tuple[mx.array, mx.array]] | None = None

    def touches(self, rows: RowSlots) -> bool:
        """True when some row's adapter changes one of the block's linears."""
        return any(rows.select(module) for module in self.modules.values())

    def combine(self, rows: RowSlots, experts: mx.array) -> mx.array:
        by_row = experts.astype(mx.uint32).reshape(rows.num_rows, -1)
        return (by_row * rows.num_distinct + rows.ordinals[:, None]).reshape(experts.shape)

    def split(self, rows: RowSlots, indices: mx.array) -> tuple[mx.array, mx.array]:
        """Experts and ordinals; worked out once for all linears that get the same indices."""
        if self._split is None or self._split[0] is not indices:
            number = rows.num_distinct
            self._split = indices, (indices // number, indices % number)
        return self._split[1]

    def clear(self) -> None:
        self.rows = self._split = None


class BankedSwitchLinear(Banked):
    """One of the linears of a block of experts: each expert has its own A and B."""

    def __init__(self, base: nn.Module, in_use: InUse, routing: Routing) -> None:
        super().__init__(base, in_use, base.num_experts)
        self.routing = routing

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rows = self.routing.rows
        if rows is None:
            return self.base(x, indices, sorted_indices=sorted_indices)
        experts, ordinals = self.routing.split(rows, indices)
        y = self.base(x, experts, sorted_indices=sorted_indices)
        for selected in rows.select(self.banks):
            bank = selected.bank
            places = selected.indices[ordinals] + experts
            delta = x.astype(bank.a.dtype)
            for factor in (bank.a, bank.b):
                of_experts = factor.flatten(0, 1).swapaxes(-1, -2)
                delta = mx.gather_mm(delta, of_experts, rhs_indices=places)
            y = y + delta.astype(y.dtype)
        return y

    def prepare(self, tensors: AdapterTensors, rank: int, dtype: mx.Dtype) -> PositionTensors:
        return PositionTensors(
            _pad(tensors.a, -2, rank).astype(dtype), _pad(tensors.b, -1, rank).astype(dtype)
        )


class BankedExperts(nn.Module):
    """A block of experts (mlx-lm's `SwitchGLU` or `SwitchMLP`) whose linears have adapters."""

    def __init__(self, base: nn.Module, in_use: InUse) -> None:
        super().__init__()
        self.base = base
        self.in_use = in_use
        self.routing = Routing()
        for name, child in list(base.items()):
            if isinstance(child, SwitchLinear | QuantizedSwitchLinear):
                base[name] = BankedSwitchLinear(child, in_use, self.routing)
                self.routing.modules[name] = base[name].banks

    @property
    def linears(self) -> dict[str, BankedSwitchLinear]:
        """The block's linears, by their names in it."""
        return {name: self.base[name] for name in self.routing.modules}

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        rows = self.in_use.rows
        if rows is None or not self.routing.touches(rows):
            return self.base(x, indices)
        self.routing.rows = rows
        try:
            return self.base(x, self.routing.combine(rows, indices))
        finally:
            self.routing.clear()


def _add_delta(
    y: mx.array, x: mx.array, factors: Sequence[mx.array], indices: mx.array
) -> mx.array:
    """y plus x times each row's own factors, one after the other.

    Args:
        y: (rows, ..., out), or (rows * tokens, out).
        x: (rows, ..., in), or (rows * tokens, in) where a model has flattened it.
        factors: (positions, in, out) each.
        indices: (rows,).
    """
    delta = x.reshape(indices.shape[0], -1, x.shape[-1]).astype(factors[0].dtype)
    for factor in factors:
        delta = mx.gather_mm(delta, factor, rhs_indices=indices)
    return y + delta.reshape(y.shape).astype(y.dtype)


def _times_row(y: mx.array, factors: mx.array) -> mx.array:
    """y (rows, ..., out) times each row's own factors (rows, out)."""
    num_rows, num_out = factors.shape
    product = factors[:, None].astype(y.dtype) * y.reshape(num_rows, -1, num_out)
    return product.reshape(y.shape)


def _pad(factor: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return mx.pad(factor, widths)


def _dora_excess(
    tensors: AdapterTensors, base: nn.Module, delta: Callable[[], mx.array]
) -> mx.array | None:
    """m / |W + delta| - 1, (weight's rows,) float32; None without magnitudes."""
    if tensors.magnitude is None:
        return None
    return tensors.magnitude / mx.linalg.norm(dequantized_weight(base) + delta(), axis=1) - 1


def check_tensors(
    name: str, base: nn.Module, tensors: AdapterTensors, is_output: bool = False
) -> None:
    """Check that a layer of the base model can take an adapter's tensors.

    Args:
        is_output: they change what an embedding does as the output layer.

    Raises:
        PackagingError: the layer is of a kind that takes no adapter, or the shapes differ.
    """
    expected: tuple[tuple[int, ...], tuple[int, ...]]
    rank = tensors.a.shape[1]
    num_weights = 0  # rows of the weight matrix: what DoRA has a magnitude for
    if isinstance(base, SwitchLinear | QuantizedSwitchLinear):
        num_experts, num_in, num_out = base.num_experts, base.input_dims, base.output_dims
        expected = ((num_experts, rank, num_in), (num_experts, num_out, rank))
        if tensors.magnitude is not None:
            raise _refusal(name, f"DoRA magnitudes for {name}, whose experts take LoRA only")
    elif hasattr(base, "to_lora") or not isinstance(base, _WEIGHTS):
        raise _refusal(name, f"tensors for {name}, a {type(base).__name__}, which takes no adapter")
    else:
        num_weights, num_columns = base.weight.shape[0], weight_columns(base)
        is_linear = is_output or isinstance(base, nn.Linear | nn.QuantizedLinear)
        num_in, num_out = (num_columns, num_weights) if is_linear else (num_weights, num_columns)
        expected = ((num_in, rank), (rank, num_out))
    found = (tensors.a.shape, tensors.b.shape)
    if found != expected:
        raise PackagingError(
            f"the adapter's tensors for {name} have the shapes {found[0]} and {found[1]}; the base "
            f"model needs {expected[0]} and {expected[1]}: it was trained on another base",
            "load_adapter",
            {"module": name},
        )
    if tensors.magnitude is not None and tensors.magnitude.shape != (num_weights,):
        raise _refusal(
            name, f"{count(tensors.magnitude.size, 'magnitude')} for {name}, not {num_weights}"
        )


def _refusal(name: str, found: str) -> PackagingError:
    return PackagingError(f"the adapter has {found}", "load_adapter", {"module": name})


def make_banked(base: nn.Module, in_use: InUse) -> BankedLinear | BankedEmbedding:
    """The layer that wraps a linear or an embedding; experts are wrapped by their block."""
    is_linear = isinstance(base, nn.Linear | nn.QuantizedLinear)
    return (BankedLinear if is_linear else BankedEmbedding)(base, in_use)


def compute_dtype(layer: nn.Module) -> mx.Dtype:
    """What a layer of the base model computes in."""
    names = ("scales", "biases", "bias") if "scales" in layer else ("weight",)
    arrays = (layer.get(name) for name in names)  # scales are bytes in some modes
    dtypes = (array.dtype for array in arrays if array is not None)
    return next((dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)), mx.bfloat16)


def weight_columns(layer: nn.Module) -> int:
    """Columns of a weight matrix, (rows, columns), counted before it was packed."""
    if "scales" in layer:
        return int(layer.scales.shape[-1] * layer.group_size)
    return int(layer.weight.shape[-1])


def dequantized_weight(layer: nn.Module) -> mx.array:
    """A layer's weight in float32, (rows, columns) or (experts, rows, columns)."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    scales, biases = layer.scales, layer.get("biases")
    if layer.mode == "affine":  # in bfloat16 the product would be rounded once more
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        layer.weight,
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        global_scale=layer.get("global_scale"),
        dtype=mx.float32,
    )
