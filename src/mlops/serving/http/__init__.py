"""One ASGI app for a served model: routes, bodies, errors, batches, streams; whoever serves it."""

from mlops.serving.http.app import ServiceInfo, create_app
from mlops.serving.http.host import RunnerHost, Status

__all__ = ["RunnerHost", "ServiceInfo", "Status", "create_app"]
