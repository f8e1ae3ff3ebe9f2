"""A replica's metrics through Ray's own exporter, so that one scrape of a node tells of all on it.

Names are those of `/metrics/prometheus`, to which Ray adds `ray_`; labels are the same and
`application`, `deployment`, `replica` (Ray's) and `project`. What is made only when somebody asks,
`vllm:lora_requests_info` and `mlops_kv_cache_usage_perc`, is left out: it can be computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray.serve import metrics as ray_metrics

from mlops.serving.http.prometheus import TIME_BUCKETS_S, Metrics

logger = logging.getLogger(__name__)

REFRESH_S = 1.0


class RayMetrics:
    """Keeps Ray's metrics equal to those of a service; None is ever counted twice."""

    def __init__(self, project_name: str, metrics: Metrics) -> None:
        self._metrics = metrics
        self._project = {"project": project_name}
        self._made: dict[str, Any] = {}
        self._counted: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._help = {family.name: family.documentation for family in metrics.collect()}
        metrics.on_observed = self._observe

    async def keep(self) -> None:
        """Take over counters and gauges every second, until cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                self.refresh()
            except Exception:
                logger.exception("the metrics could not be handed to Ray")

    def refresh(self) -> None:
        """Take over counters and gauges as they are now."""
        for family in self._metrics.collect():
            for sample in family.samples:
                if family.type == "counter" and sample.name.endswith("_total"):
                    self._count(family.name, sample.labels, sample.value)
                elif family.type == "gauge":
                    self._find(ray_metrics.Gauge, family.name, sample.labels).set(
                        sample.value, self._tags(sample.labels)
                    )

    def _count(self, name: str, labels: Mapping[str, str], value: float) -> None:
        key = (name, frozenset(labels.items()))
        if growth := value - self._counted.get(key, 0.0):
            self._counted[key] = value
            self._find(ray_metrics.Counter, name, labels).inc(growth, self._tags(labels))

    def _observe(self, name: str, labels: tuple[str, ...], value: float) -> None:
        named = {"route": labels[0]} if labels else {}
        # Ray refuses 0, which its tracing of buckets takes for no value.
        self._find(ray_metrics.Histogram, name, named, boundaries=list(TIME_BUCKETS_S)).observe(
            max(value, 1e-9), self._tags(named)
        )

    def _tags(self, labels: Mapping[str, str]) -> dict[str, str]:
        return {**labels, **self._project}

    def _find(self, kind: Any, name: str, labels: Mapping[str, str], **options: Any) -> Any:
        if name not in self._made:
            self._made[name] = kind(
                name,
                description=self._help.get(name, ""),
                tag_keys=(*labels, *self._project),
                **options,
            )
        return self._made[name]
