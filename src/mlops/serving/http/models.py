"""`GET /v1/models` and the names that `model` may have: the base model and its adapters.

    my_model                          the service's own model
    base                              the bare base model, also where the service is an adapter
    formal, base:formal, my_model:formal    an adapter

Cards are vLLM's: an adapter has its base as `parent`, and `root` says where a model comes from.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlops.engine import BASE_NAME
from mlops.errors import AdapterNotFoundError
from mlops.serving.http.served import Served, ServiceInfo


class Models:
    """The endpoints of one served model."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._created = int(time.time())
        self._name, self._root = _name_and_root(served.info)

    async def get_models(self, _: Request) -> Response:
        """Every model that a request may name."""
        return JSONResponse({"object": "list", "data": self._cards()})

    async def get_model(self, request: Request) -> Response:
        """One of them."""
        name: str = request.path_params["id"]
        for card in self._cards():
            if card["id"] == self._canonical(name):
                return JSONResponse(card)
        raise unknown_model(name)

    def _canonical(self, name: str) -> str:
        """The `id` of what a request means that gives this name as its `model`."""
        adapter = adapter_of(name, self._served.info.model_names).get("adapter")
        facts = self._facts()
        if adapter is None:
            return facts.get("default_adapter") or self._name
        if adapter == BASE_NAME:
            return BASE_NAME if facts.get("default_adapter") else self._name
        return adapter

    def _cards(self) -> list[dict[str, Any]]:
        facts = self._facts()
        default = facts.get("default_adapter")
        common = {
            "object": "model",
            "created": self._created,
            "owned_by": self._served.info.project_name,
            "max_model_len": facts.get("context_tokens"),
        }
        base = self._name if default is None else BASE_NAME
        root = self._root if default is None else None
        roots: Mapping[str, str] = facts.get("adapter_tags") or {}
        return [
            {"id": base, **common, "root": root, "parent": None},
            *(
                {
                    "id": name,
                    **common,
                    "root": self._root if name == default else roots.get(name, name),
                    "parent": base,
                }
                for name in facts.get("adapters", ())
            ),
        ]

    def _facts(self) -> Mapping[str, Any]:
        """What the runner says of its model; nothing before it is loaded."""
        describe = getattr(self._served.host.runner, "describe", None)
        return describe() if describe else {}


def adapter_of(model: str, base_names: Collection[str]) -> dict[str, str]:
    """The runner's field `adapter`, left out where the service's own default is meant.

    Args:
        model: as a client says it.
        base_names: what the served model is called; anything else is an adapter of it.
    """
    if model in base_names:
        return {}
    for name in sorted((BASE_NAME, *base_names), key=len, reverse=True):  # a tag has a colon too
        adapter = model.removeprefix(f"{name}:")
        if adapter and adapter != model:
            return {"adapter": adapter}
    return {"adapter": model}


def unknown_model(model: str, why: AdapterNotFoundError | None = None) -> AdapterNotFoundError:
    """The error of a request for a model that is not there; `why` is what the runner says."""
    reason = f": {why}" if why else "; GET /v1/models lists those that do"
    return AdapterNotFoundError(f"the model {model[:80]!r} does not exist{reason}")


def _name_and_root(info: ServiceInfo) -> tuple[str, str | None]:
    """What the served model is called, and where it comes from: no path of this machine."""
    if info.model_tag:
        return info.model_tag.partition(":")[0], info.model_tag
    root = info.model
    if root is not None and Path(root).exists():
        root = Path(root).resolve().name
    return info.service_name, root
