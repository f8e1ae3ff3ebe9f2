"""One ASGI app for a served model: routes, bodies, errors, batches, streams; whoever serves it."""

from mlops.serving.http.app import create_app
from mlops.serving.http.host import RunnerHost, Status
from mlops.serving.http.served import Served, ServiceInfo
from mlops.serving.http.settings import HTTPSettings

__all__ = ["HTTPSettings", "RunnerHost", "Served", "ServiceInfo", "Status", "create_app"]
