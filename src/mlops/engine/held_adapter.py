"""The adapter that a request means, looked up once.

A name may mean another adapter at any moment. The prompt, its grammar, the weights and the end
tokens of one request are of the same: it is held from the time that its prompt is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlops.engine.residency import Adapter, AdapterRegistry

if TYPE_CHECKING:
    from mlops.engine.loading import LoadedModel


class HeldAdapter:
    """What a name means to one request, until `release` or the end of the `with` block.

    Args:
        name: None is the base model.
        load: gives the model as requests for an adapter see it.
        on_release: called where this was the last request that held it.

    Raises:
        AdapterNotFoundError: there is no such name.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        name: str | None,
        *,
        load: Callable[[Adapter | None], LoadedModel],
        on_release: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._adapter = None if name is None else registry.acquire(name)
        self._load = load
        self._on_release = on_release

    @property
    def loaded(self) -> LoadedModel:
        """The model with the adapter's tokenizer and templates; may take a second.

        Raises:
            PackagingError: the tokenizer cannot be used.
        """
        return self._load(self._adapter)

    def share(self) -> Adapter | None:
        """The adapter for the engine, which releases it by itself; None is the base model."""
        if self._adapter is not None:
            self._registry.share(self._adapter)
        return self._adapter

    def release(self) -> None:
        """Give it back, once."""
        if self._adapter is not None:
            self._registry.release(self._adapter)
            if self._adapter.num_users == 0:
                self._on_release()

    def __enter__(self) -> HeldAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
