"""What Ray Serve runs: one replica of a service, with the same app as anywhere else.

__init__     fetch what this node lacks -> load the Bento, or make the app without BentoML
             -> load the model; a failure here is the deployment's, with its reason
ASGI         Ray's proxy -> the app -> (`handover`)
check_health a model that is gone or an engine that stands still: Ray starts another replica
reconfigure  adapters and limits, while requests run
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.errors import DeploymentError
from mlops.serving.http import Served, Status
from mlops.serving.http.limits import Limits
from mlops.serving.http.paths import LISTENS_ON
from mlops.serving.ray import handover
from mlops.serving.ray.affinity import owners_of
from mlops.serving.ray.cluster import serve_host
from mlops.serving.ray.deployment import Plan
from mlops.serving.ray.metrics import RayMetrics

if TYPE_CHECKING:
    from mlops.serving.bentoml.config import BentoMLConfig

logger = logging.getLogger(__name__)

LEARN_AGAIN_S = 1.0

_built: list[ASGIApp] = []


def _app() -> ASGIApp:
    """The app of this process's replica; Ray asks for it after the constructor."""
    return _built[-1]


@serve.ingress(_app)
class ModelReplica:
    """One replica.

    Args:
        plan: `Plan.to_dict`.
    """

    async def __init__(self, plan: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._plan = Plan.from_dict(plan)
        self._context = serve.get_replica_context()
        _log_where_ray_logs()
        await asyncio.to_thread(self._plan.fetch)
        self._app, self._served = self._load()
        self._added: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        listens_on = await asyncio.to_thread(serve_host)
        _built.append(_BehindProxy(self._app, listens_on))
        if self._served is not None:
            await self._start(self._served)

    @property
    def settings(self) -> BentoMLConfig:
        """What this replica was started with."""
        return self._plan.config

    def _load(self) -> tuple[ASGIApp, Served | None]:
        """The app, not started; and what it serves, unless the service is a user's own."""
        plan = self._plan
        if plan.recipe is not None:
            model = plan.make_model()
            _let_ray_serve(model.served)
            model.served.version = plan.tag.partition(":")[2]
            model.read_http_settings()
            return _app_alone(model.served), model.served
        service = plan.load_bento()
        served: Served | None = getattr(getattr(service, "served_model", None), "served", None)
        if served is not None:
            _let_ray_serve(served)
        return service.to_asgi(), served

    async def _start(self, served: Served) -> None:
        """Load the model and wait for it.

        Raises:
            MLOpsError: what loading it raised.
        """
        host = served.host
        host.start()
        while host.status is Status.LOADING:
            await asyncio.sleep(0.05)
        if host.failure is not None:
            raise host.failure
        if served.metrics:
            self._keep(RayMetrics(served.info.project_name, served.metrics).keep())

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """Answer a request that another replica has sent on."""
        messages = handover.answer(self._app, scope, body)
        async with contextlib.aclosing(messages):  # type: ignore[type-var]
            async for several in messages:
                yield several

    async def ping(self) -> str:
        """This replica's id."""
        return self._me

    async def check_adapters(self, adapters: Mapping[str, str]) -> None:
        """See that adapters can be had and fit, before all replicas are told of them.

        Raises:
            MLOpsError: one cannot.
        """
        before = dict(self._added)
        try:
            for name, reference in adapters.items():
                if self._added.get(name) != reference:
                    await asyncio.to_thread(self._add_adapter, name, reference)
                    self._added[name] = reference
        except BaseException:
            for name in [name for name in self._added if self._added[name] != before.get(name)]:
                await asyncio.to_thread(self._put_back, name, before.get(name))
            self._added = before
            raise

    def check_health(self) -> None:
        """Called by Ray every few seconds; what it raises has the replica replaced.

        Raises:
            DeploymentError: the model is gone, or what computes is dead or stands still.
        """
        if self._served is None:
            return
        host = self._served.host
        host.check()
        if host.status not in {Status.HEALTHY, Status.LOADING}:
            told = f": {host.failure}" if host.failure else ""
            raise DeploymentError(f"the model is {host.status.value}{told}", "check_health")

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take over adapters and limits; called by Ray at the start and when they change.

        Raises:
            MLOpsError: an adapter cannot be had, or does not fit.
        """
        if self._served is None:
            return
        self._limit(user_config.get("limits") or {})
        wanted: Mapping[str, str] = user_config.get("adapters") or {}
        for name in [name for name in self._added if name not in wanted]:
            await asyncio.to_thread(self._runner.remove_adapter, name)
            del self._added[name]
        await self.check_adapters(wanted)
        self._share_adapters()

    def _limit(self, limits: Mapping[str, Any]) -> None:
        settings = self.settings.with_changes(limits)
        if self._served is None:
            return
        self._served.host.timeout_s = settings.timeout
        if self._served.limits is not None:
            self._served.limits.per_minute = settings.http.requests_per_minute
            self._served.limits.at_once = settings.http.max_concurrent_requests

    def _add_adapter(self, name: str, reference: str) -> None:
        self._plan.fetch_adapter(reference)
        self._runner.add_adapter(name, reference, replace=True)

    def _put_back(self, name: str, reference: str | None) -> None:
        if reference is None:
            self._runner.remove_adapter(name)
        else:
            self._runner.add_adapter(name, reference, replace=True)

    @property
    def _runner(self) -> Any:
        runner = self._served.host.runner if self._served else None
        if runner is None or not hasattr(runner, "add_adapter"):
            raise DeploymentError("the model of this service takes no adapters", "reconfigure")
        return runner

    @property
    def _me(self) -> str:
        return str(self._context.replica_id.unique_id)

    def _share_adapters(self) -> None:
        """Let every adapter be answered for by one replica, as long as there are several."""
        served = self._served
        names = tuple(sorted(getattr(served and served.host.runner, "adapter_names", ())))
        owners = owners_of(self._context.app_name, self._context.deployment)
        owners.adapters = names
        if served is None or not names or not self.settings.ray.adapter_affinity:
            return
        if served.elsewhere is None:
            handle = serve.get_deployment_handle(self._context.deployment, self._context.app_name)
            max_at_once = self.settings.max_batch_size  # half of what Ray sends to a replica
            served.elsewhere = handover.Handover(handle, served, owners, self._me, max_at_once)
            self._keep(_learn_replicas(handle))

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass(frozen=True)
class _BehindProxy:
    """The app as Ray calls it: its proxy listens, and adds `X-Request-Id` to answers itself."""

    app: ASGIApp
    listens_on: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    one for one in message.get("headers", ()) if one[0].lower() != b"x-request-id"
                ]
                message = {**message, "headers": headers}
            await send(message)

        scope = {**scope, LISTENS_ON: (self.listens_on,)}
        await self.app(scope, receive, send_on if scope["type"] == "http" else send)


def _app_alone(served: Served) -> ASGIApp:
    """The service's routes, without BentoML's."""
    from mlops.serving.http import create_app

    app = create_app(served)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(served.host.stop)

    app.router.lifespan_context = lifespan
    return app


def _let_ray_serve(served: Served) -> None:
    served.limits = Limits(None, None)  # `reconfigure` sets them
    served.cancelling_is_leaving = True


async def _learn_replicas(handle: Any) -> None:
    """Use the handle once: only then does Ray tell this process which replicas there are."""
    while True:
        try:
            await handle.options(method_name="ping").remote()
        except Exception:  # the deployment is just starting, or Ray is busy with something else
            await asyncio.sleep(LEARN_AGAIN_S)
        else:
            return


@functools.cache
def _log_where_ray_logs() -> None:
    """Let what we log go to the replica's own log, which Ray's dashboard shows."""
    ours, rays = logging.getLogger("mlops"), logging.getLogger("ray.serve")
    ours.setLevel(logging.INFO)
    for handler in rays.handlers:
        ours.addHandler(handler)
