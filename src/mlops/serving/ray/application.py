"""What Ray Serve's YAML names: `import_path: mlops.serving.ray.application:build`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from mlops.serving.ray.deployment import Plan
from mlops.serving.ray.replica import ModelReplica


def build(args: Mapping[str, Any]) -> serve.Application:
    """Ray Serve's application of a plan.

    Args:
        args: `Plan.to_dict`.

    Raises:
        MLOpsError: they are no plan.
    """
    return bind(Plan.from_dict(args))


def bind(plan: Plan, *, num_gpus: float = 0) -> serve.Application:
    """The application, with the plan's options.

    Args:
        num_gpus: of a replica, where the settings leave that open.
    """
    options = plan.options(num_gpus=num_gpus)
    options["request_router_config"] = RequestRouterConfig(**options["request_router_config"])
    deployment = serve.deployment(ModelReplica).options(
        **options,
        # Ray's own is new each time, and would restart replicas that need no more than to be told.
        version=plan.version,
        _internal=True,
    )
    return deployment.bind(plan.to_dict())
