"""What a deployment is to run, as plain data: a `Plan`.

    Bento + configuration -> `Plan` -> Ray Serve's options, its YAML, and what each replica is given

A plan goes to the replicas as JSON and comes back from a running deployment, so that it can be
scaled, changed or taken back without anything kept here.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.errors import BentoMLError, ConfigError, DeploymentError, PackagingError, sentence_of
from mlops.registry import ModelStore, shared
from mlops.registry.index import newest
from mlops.registry.manifest import digest_of
from mlops.registry.references import split_reference
from mlops.serving.bentoml.bento import private_import
from mlops.serving.bentoml.config import BentoMLConfig, ServingBackend
from mlops.serving.bentoml.served_model import ServedModel, deployed_with, make_served_model

if TYPE_CHECKING:
    from bentoml import Service

IMPORT_PATH = "mlops.serving.ray.application:build"
ROUTER = "mlops.serving.ray.routing:AdapterRouter"
_LIVE_HTTP = ("requests_per_minute", "max_concurrent_requests")
_SCALING = ("workers", "ray_address", "ray_min_replicas", "ray_max_replicas", "host", "port")
_LIVE_RAY = (
    *("route_prefix", "target_ongoing_requests", "upscale_delay_s", "downscale_delay_s"),
    *("max_surge_percent", "model_source"),
)
_OPERATION = "deploy"


@dataclass(frozen=True)
class Plan:
    """One deployment.

    Attributes:
        tag: of the Bento, or of the model where no Bento is used.
        digest: of all that it consists of; see `registry.shared`.
        settings: what of the configuration differs from the defaults.
        adapters: names of the adapters that are a part of the service.
        recipe: arguments of `make_served_model`, where BentoML is not used.
        added: further adapters by name: tags with digests.
    """

    tag: str
    digest: str
    settings: Mapping[str, Any]
    adapters: tuple[str, ...] = ()
    recipe: Mapping[str, Any] | None = None
    added: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, tag: str, config: BentoMLConfig | Mapping[str, Any] | None = None) -> Plan:
        """The plan for a stored Bento, under a configuration.

        The Bento's own settings hold where the configuration says nothing: a `BentoMLConfig` says
        what differs from the defaults.

        Raises:
            ConfigError: a setting holds what it may not, or the backend is not Ray Serve.
            BentoMLError: there is no such Bento, or it cannot be loaded.
        """
        given = config if isinstance(config, BentoMLConfig) else BentoMLConfig.load(config)
        if config is None and not given.uses_ray:
            given.serving_backend = ServingBackend.HYBRID
        model = _Model.find(tag, without_bento=given.effective_backend is ServingBackend.RAY_SERVE)
        settings = model.settings.with_changes(given.changes())
        settings.serving_backend = given.effective_backend
        settings.to_ray_serve_config()  # refuses what cannot be
        if settings.http.enable_runtime_adapters and settings.ray_replicas[1] > 1:
            raise ConfigError(
                "http.enable_runtime_adapters needs one replica (`--replicas 1`), for a "
                "client reaches one of several; add adapters to all with `mlops deploy --adapter`"
            )
        return cls(
            model.tag,
            shared.local_digest(model.tag),
            settings.changes(),
            model.adapters,
            model.recipe if settings.serving_backend == ServingBackend.RAY_SERVE else None,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """What `to_dict` gave.

        Raises:
            DeploymentError: it is something else.
        """
        try:
            return cls(**{"settings": {}, **values, "adapters": tuple(values.get("adapters", ()))})
        except TypeError as exc:
            raise DeploymentError(f"not a deployment of this toolkit: {exc}", _OPERATION) from exc

    def to_dict(self) -> dict[str, Any]:
        """JSON types; what is empty is left out."""
        values = {**asdict(self), "adapters": list(self.adapters)}
        return {name: value for name, value in values.items() if value}

    @functools.cached_property
    def config(self) -> BentoMLConfig:
        """The settings."""
        return BentoMLConfig.from_dict(self.settings)

    def with_config(self, **changes: Any) -> Plan:
        """The same with other settings."""
        return replace(self, settings=self.config.with_changes(changes).changes())

    @property
    def application(self) -> str:
        """The name of the Serve application: the project's and the service's."""
        config = self.config
        project = re.sub(r"[^A-Za-z0-9_]+", "-", config.project_name).strip("-")
        if config.project_name == "default" or not project:
            return config.service_name
        return f"{project}-{config.service_name}"

    @property
    def route_prefix(self) -> str:
        """The path that the service answers below."""
        return self.config.ray.route_prefix or f"/{self.application}"

    @property
    def deployment(self) -> str:
        """The name of the deployment in the application."""
        return self.config.ray_deployment_name or self.config.service_name

    @property
    def version(self) -> str:
        """Changes with what a running replica cannot take over."""
        settings = {
            k: v for k, v in self.config.to_dict().items() if k not in {*_SCALING, "timeout"}
        }
        for section, live in (("ray", _LIVE_RAY), ("http", _LIVE_HTTP)):
            settings[section] = {k: v for k, v in settings[section].items() if k not in live}
        content = {**self.to_dict(), "settings": settings, "added": {}}
        return digest_of(content).removeprefix("sha256:")[:16]

    def options(self, *, num_gpus: float = 0) -> dict[str, Any]:
        """Options of Ray Serve's deployment, as its YAML has them.

        Args:
            num_gpus: of a replica, where the settings leave that open.
        """
        options = self.config.to_ray_serve_config()
        if self.config.ray.num_gpus is None and num_gpus:
            options["ray_actor_options"]["num_gpus"] = num_gpus
        options["request_router_config"] = {
            "request_router_class": ROUTER,
            "request_router_kwargs": {"adapters": list(self.adapters)},
        }
        options["logging_config"] = {"enable_access_log": False}  # we write a line for each
        options["user_config"] = self.user_config
        return options

    @property
    def user_config(self) -> dict[str, Any]:
        """What replicas take over while they run; and the plan, for who looks at them later."""
        config = self.config
        return {
            "adapters": dict(self.added),
            "limits": {
                "timeout": config.timeout,
                "http": {name: getattr(config.http, name) for name in _LIVE_HTTP},
            },
            "plan": self.to_dict(),
        }

    def to_serve_config(self) -> dict[str, Any]:
        """The YAML that `serve deploy` takes, as a table."""
        return {
            "proxy_location": "EveryNode",
            "http_options": {"host": self.config.host, "port": self.config.port},
            "applications": [
                {
                    "name": self.application,
                    "route_prefix": self.route_prefix,
                    "import_path": IMPORT_PATH,
                    "args": self.to_dict(),
                    "deployments": [self.options()],
                }
            ],
        }

    # In a replica.

    def fetch(self) -> None:
        """See that this node's store has what the plan names, and nothing else under its tag.

        Raises:
            MLOpsError: it has not, and cannot get it.
        """
        if source := self.config.ray.model_source:
            shared.fetch(self.tag, self.digest, source)
            return
        found = shared.local_digest(self.tag)
        if found != self.digest:
            raise DeploymentError(
                f"this node's store has another {self.tag} than was deployed ({found}, not "
                f"{self.digest}): remove it there, or set ray.model_source",
                "fetch",
                {"tag": self.tag, "expected": self.digest, "found": found},
            )

    def fetch_adapter(self, reference: str) -> None:
        """See that this node's store has an adapter.

        Raises:
            MLOpsError: it has not, and cannot get it.
        """
        parts = split_reference(reference)
        source = self.config.ray.model_source
        if parts and source and not ModelStore().has(parts[0]):
            shared.fetch(parts[0], None, source)  # its digest is in the reference

    def load_bento(self) -> Service[Any]:
        """The Bento's service, with the plan's settings.

        Raises:
            BentoMLError: it cannot be loaded.
        """
        with deployed_with(self._settings_of_replica()):
            return _load(self.tag)

    def make_model(self) -> ServedModel:
        """What the recipe makes, with the plan's settings.

        Raises:
            MLOpsError: it cannot be made.
        """
        with deployed_with(self._settings_of_replica()):
            return make_served_model(**(self.recipe or {}))

    def _settings_of_replica(self) -> dict[str, Any]:
        """The settings, with as many `workers` as this node may run replicas: they share it."""
        from mlops.hardware import detect

        by_cores = int(detect().cores // (self.config.cpu_per_worker or 1))
        workers = max(1, min(self.config.ray_replicas[1], by_cores))
        return {**self.config.to_dict(), "workers": workers}


@dataclass(frozen=True)
class _Model:
    """What the store has under a tag: a service's own settings and parts."""

    tag: str
    settings: BentoMLConfig
    adapters: tuple[str, ...]
    recipe: dict[str, Any] | None

    @classmethod
    def find(cls, tag: str, *, without_bento: bool) -> _Model:
        """A Bento; or a model, where no Bento is needed and there is none."""
        bento = _full_tag(tag)
        if bento is None:
            if without_bento and (stored := _full_model_tag(tag)):
                return cls._of(
                    stored, make_served_model(stored, service_name=stored.partition(":")[0])
                )
            raise DeploymentError(
                f"there is no Bento {tag!r} in the store; `bentoml list` shows what there is, and "
                "`mlops package FOLDER` makes one",
                _OPERATION,
                {"bento_tag": tag},
            )
        with private_import():
            service = _load(bento)
        model: ServedModel | None = getattr(service, "served_model", None)
        if model is None:
            if without_bento:
                raise DeploymentError(
                    f"the service of {bento} is no model of this toolkit's: deploy it with the "
                    "backend 'hybrid'",
                    _OPERATION,
                )
            return cls(bento, BentoMLConfig(service_name=service.name), (), None)
        if without_bento:
            _check_recipe(bento, model.recipe)
        return cls._of(bento, model)

    @classmethod
    def _of(cls, tag: str, model: ServedModel) -> _Model:
        adapters = (model.recipe or {}).get("adapters", {})
        recipe = model.recipe and {
            **model.recipe,
            "digest": model.recipe["digest"] or ModelStore().get(model.recipe["model_path"]).digest,
        }
        return cls(tag, model.settings, tuple(sorted(adapters)), recipe)


def _check_recipe(bento: str, recipe: Mapping[str, Any] | None) -> None:
    """Without BentoML a replica has the store and nothing else of the Bento.

    Raises:
        DeploymentError: the service needs more.
    """
    if recipe is None:
        reason = "its runner is a class in the Bento"
    else:
        named = [recipe["model_path"], recipe["base_model"], *recipe["adapters"].values()]
        outside = [one for one in named if one and (Path(one).exists() or not split_reference(one))]
        reason = f"{outside[0]} is not in the model store" if outside else ""
    if reason:
        raise DeploymentError(
            f"{bento} cannot be served without BentoML, because {reason}: use the backend 'hybrid'",
            _OPERATION,
            {"bento_tag": bento},
        )


def _full_tag(tag: str) -> str | None:
    """The tag of a stored Bento with its version; None when there is none."""
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        return str(bentoml.bentos.get(tag).tag)
    except (BentoMLException, ValueError):
        return None


def _full_model_tag(tag: str) -> str | None:
    """The tag of a stored model with its version; None when there is none."""
    try:
        tag = newest(tag)
    except PackagingError:
        return None
    return tag if ModelStore().has(tag) else None


def _load(bento: str) -> Service[Any]:
    """Import a Bento's service.

    Raises:
        BentoMLError: it cannot be imported.
    """
    import bentoml

    with _as_deployment_error(bento):
        service: Service[Any] = bentoml.load(bento, standalone_load=True)
    return service


@contextlib.contextmanager
def _as_deployment_error(bento: str) -> Iterator[None]:
    try:
        yield
    except BentoMLError:
        raise
    except Exception as exc:  # the Bento's own code, too
        raise DeploymentError(
            f"the service of {bento} cannot be loaded: {sentence_of(exc)}",
            "load",
            {"bento_tag": bento},
        ) from exc
