"""`BentoMLConfig.ray`: where replicas on Ray Serve run, how many there are, and who gets what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mlops.serving.bentoml import config_values as allow
from mlops.serving.bentoml.config_values import CheckedFields, Rule


@dataclass(kw_only=True)
class RayOptions(CheckedFields):
    """A deployment on Ray Serve, besides `BentoMLConfig`'s own `ray_…` fields.

    Attributes:
        route_prefix: the path that the service answers below; by default the application's name.
        target_ongoing_requests: a replica is added when the average one has more to do; by default
            `max_batch_size`.
        upscale_delay_s: how long that must be so.
        downscale_delay_s: how long there must be too little to do before a replica goes.
        num_gpus: of a replica: NVIDIA's or Apple's, whatever the cluster calls GPU. None is 1 where
            the cluster has some and `apple_silicon.enable_mps` allows it, else 0.
        resources: further resources of the cluster that a replica takes, by name.
        model_source: a folder that all nodes see, or a URL such as s3://bucket/models. A deployment
            puts the Bento there, and nodes that lack it fetch it, once each.
        adapter_affinity: send requests for an adapter to the replica that holds it.
        max_surge_percent: replicas that an update may start before it stops old ones, in percent of
            all; 0 stops old ones first.

    Raises:
        ConfigError: a field is unknown or holds what it may not.
    """

    route_prefix: str | None = None
    target_ongoing_requests: float | None = None
    upscale_delay_s: float = 2
    downscale_delay_s: float = 300
    num_gpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    model_source: str | None = None
    adapter_affinity: bool = True
    max_surge_percent: int = 25

    _rules: ClassVar[Mapping[str, Rule]] = {
        "route_prefix": allow.optional(
            allow.text(
                "a path such as '/chat', without '/' at its end",
                pattern=r"/|(/[A-Za-z0-9._~-]*[A-Za-z0-9_~][A-Za-z0-9._~-]*)+",
            )
        ),
        "target_ongoing_requests": allow.optional(allow.positive_number(100_000)),
        "upscale_delay_s": allow.number_from_0(86_400),
        "downscale_delay_s": allow.number_from_0(86_400),
        "num_gpus": allow.optional(allow.number_from_0(64)),
        "resources": allow.amounts(),
        "model_source": allow.optional(
            allow.text("a folder, or a URL such as s3://bucket/models", max_length=4096)
        ),
        "adapter_affinity": allow.flag(),
        "max_surge_percent": allow.whole_number(0, 100),
    }
