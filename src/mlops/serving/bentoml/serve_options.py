"""What `mlops serve` is told besides what to serve: settings and adapters above the service's own.

The server and each of its workers import the service's module for themselves, so this goes to them
in a variable of the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mlops.errors import ServiceError

VARIABLE = "MLOPS_SERVE_OPTIONS"

_OPERATION = "create_service"


@dataclass(frozen=True)
class ServeOptions:
    """Options of the command line.

    Attributes:
        names: of the options that were given, as they were typed.
        settings: as `BentoMLConfig.with_changes` takes them.
        adapters: folders, tags or hub ids by the name that a request gives.
    """

    names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def given(cls) -> ServeOptions:
        """Those that this process was started with."""
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else cls()

    def hand_on(self) -> None:
        """Let the processes that this one starts have them, and this one too."""
        os.environ[VARIABLE] = json.dumps(asdict(self), default=str)

    def check_honoured(self, service: Any) -> None:
        """Refuse options for a service that does not read them.

        Raises:
            ServiceError: BentoML's service was not made by `create_bentoml_service`.
        """
        if self.names and getattr(service, "served_model", None) is None:
            raise ServiceError(
                f"{', '.join(self.names)} cannot be honoured: the service {service.name!r} was not "
                "made by create_bentoml_service; serve it without, or make it so",
                _OPERATION,
                {"refused": list(self.names)},
            )

    def add_to(self, adapters: Mapping[str, Any]) -> dict[str, Any]:
        """The service's own adapters and these.

        Raises:
            ServiceError: a name is taken.
        """
        if taken := sorted(set(adapters) & set(self.adapters)):
            raise ServiceError(
                f"the service has an adapter {taken[0]!r} already: give the one of --adapter "
                "another name",
                _OPERATION,
                {"adapter": taken[0]},
            )
        return {**adapters, **self.adapters}
