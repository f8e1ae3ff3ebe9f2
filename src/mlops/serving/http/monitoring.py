"""What a service says of itself: `/health`, `/metrics` and the probes `/livez` and `/readyz`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from mlops.errors import MLOpsError
from mlops.serving.http.errors import describe
from mlops.serving.http.host import Status
from mlops.serving.http.prometheus import Metrics, wants_prometheus
from mlops.serving.http.served import Served

_NO_MEMORY = {
    "cache_mb": 0.0,
    "active_mb": 0.0,
    "total_mb": 0.0,
    "peak_mb": 0.0,
    "mlx_available": False,
}


class Monitoring:
    """The endpoints of one served model."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._facts: Mapping[str, Any] | None = None

    async def get_livez(self, _: Request) -> Response:
        """The process answers, and no restart is needed before it can do more than that."""
        host = self._served.host
        host.check()
        return PlainTextResponse("\n", 503 if host.is_broken else 200)

    async def get_readyz(self, _: Request) -> Response:
        """Requests are welcome."""
        host = self._served.host
        host.check()
        is_ready = host.status is Status.HEALTHY and not host.is_draining
        return PlainTextResponse("\n", 200 if is_ready else 503)

    async def get_health(self, _: Request) -> Response:
        served = self._served
        served.host.check()
        status = served.host.status
        memory = await self._memory()
        body = {
            "status": status.value,
            **served.info.names,
            "model_loaded": status is Status.HEALTHY,
            "memory_usage_mb": memory["total_mb"],
            "mlx_available": memory["mlx_available"],
            "model_type": served.info.model_type,
            "model_tag": served.info.model_tag,
            "digest": served.info.digest,
            **await self._further_facts(),
        }
        if served.kept_adapters and (missing := served.kept_adapters.missing):
            body["missing_adapters"] = dict(missing)
        if (failure := served.host.failure) is not None:
            # With keys the service is for strangers too, and this route is open to them.
            body |= describe(failure) if served.settings.api_keys else _told(failure)
        return JSONResponse(body, 200 if status is Status.HEALTHY else 503)

    async def get_metrics(self, request: Request) -> Response:
        """JSON for people and browsers, text for a client that would rather have Prometheus's."""
        served, metrics = self._served, self._metrics()
        accept = request.headers.get("accept", "")
        if wants_prometheus(accept):
            return await self._prometheus(metrics, accept)
        return JSONResponse(
            {
                **served.info.names,
                "memory_usage": await self._memory(),
                "model_loaded": served.host.status is Status.HEALTHY,
                "process_id": os.getpid(),
                "uptime_s": round(time.monotonic() - served.started_s, 3),
                "requests_by_status": dict(sorted(served.requests_by_status.items())),
                **self._activity(),
            }
        )

    async def get_prometheus(self, request: Request) -> Response:
        """The same numbers and more, of all workers, as Prometheus takes them."""
        return await self._prometheus(self._metrics(), request.headers.get("accept", ""))

    def _metrics(self) -> Metrics:
        if self._served.metrics is None:
            raise HTTPException(404, "the metrics of this service are turned off")
        return self._served.metrics

    async def _prometheus(self, metrics: Metrics, accept: str) -> Response:
        metrics.refresh(self._served.host)
        text, content_type = await asyncio.to_thread(metrics.render, accept)
        return Response(text, media_type=content_type)

    def _activity(self) -> dict[str, Any]:
        """What runs and waits, from the batcher or from the runner that batches by itself."""
        host = self._served.host
        running, sizes, further = 0, {}, {}
        waiting = host.num_waiting
        if (runner := host.text_runner) is not None:
            engine = runner.statistics()  # {} from one that is just being unloaded
            running, sizes = engine.get("running", 0), engine.get("batch_sizes", {})
            waiting += engine.get("waiting", 0)
            further = {"engine": engine}
        elif (batcher := host.batcher) is not None:
            running, sizes = batcher.num_running, batcher.batch_sizes
        return {
            "requests_running": running,
            "requests_waiting": waiting,
            "batches_by_size": dict(sorted(sizes.items(), key=lambda size: int(size[0]))),
            **further,
        }

    async def _memory(self) -> dict[str, Any]:
        runner = self._served.host.runner
        if runner is None:
            return dict(_NO_MEMORY)
        # A runner may take its time here; the event loop does not wait for it.
        return {**_NO_MEMORY, **await asyncio.to_thread(runner.get_memory_usage)}

    async def _further_facts(self) -> Mapping[str, Any]:
        runner, info = self._served.host.runner, self._served.info
        if runner is None:
            return {}
        if self._facts is None:
            self._facts = await asyncio.to_thread(info.facts) if info.facts else {}
        # Asked each time: adapters come and go.
        describe_model = getattr(runner, "describe", None)
        of_model = describe_model() if describe_model else {}
        return {**self._facts, **{k: value for k, value in of_model.items() if value is not None}}


def _told(failure: Exception) -> dict[str, Any]:
    if isinstance(failure, MLOpsError):
        return {"error": {"type": type(failure).__name__, "message": str(failure)}}
    return describe(failure)
