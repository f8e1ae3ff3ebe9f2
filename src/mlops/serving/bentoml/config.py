"""How a service runs: `BentoMLConfig`, and what BentoML and Ray Serve are told of it.

A value comes from, in this order: an argument, the environment (`MLOPS_WORKERS=2`,
`MLOPS_APPLE_SILICON__ENABLE_ANE=true`), a YAML or TOML file, the default. Only `load`, `from_file`
and `detect` read the environment. Fields can be assigned; a misspelt one is a `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mlops.counts import count
from mlops.errors import ConfigError
from mlops.serving.bentoml import config_values as allow
from mlops.serving.bentoml.config_sources import flatten_batching, read_environment, read_file
from mlops.serving.bentoml.config_values import CheckedFields, Rule
from mlops.serving.bentoml.http_options import HTTPOptions
from mlops.serving.bentoml.ray_options import RayOptions

if TYPE_CHECKING:
    from mlops.hardware import HardwareInfo

TIMEOUT_MARGIN_S = 5
"""BentoML's own deadline comes this much after ours, so that a client gets our answer."""

_GIB = 1 << 30
_MIB = 1 << 20
_MAX_BATCH_SIZE = 1024
_MAX_RAY_REPLICAS = 4
_HEALTH_CHECK_S = 2
_LOADING_TRIES = 2
_LOAD_SAMPLE_S = 0.5
_EARLY_CHIPS = frozenset({"M1", "M2"})  # kept to one worker and small batches: they heat up
_THERMAL_DIVISOR = {"serious": 2, "critical": _MAX_BATCH_SIZE}
# BentoML keeps services and these settings in one table: a service so named breaks it.
_BENTOML_SETTINGS = frozenset(
    {
        *("name", "batching", "resources", "extra_ports", "replicate_process", "workers"),
        *("threads", "traffic", "backlog", "max_runner_connections", "runner_connection"),
        *("metrics", "logging", "http", "grpc", "ssl", "runner_probe", "monitoring", "tracing"),
    }
)
_NAME = r"[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?"
_NAME_ALLOWED = "letters, digits, '-', '_' and '.', with a letter or digit at both ends"


class ModelFramework(StrEnum):
    """The library that made the model."""

    MLX = "mlx"
    PYTORCH = "pytorch"
    TRANSFORMERS = "transformers"
    ONNX = "onnx"
    COREML = "coreml"


class ServingBackend(StrEnum):
    """What runs the service. HYBRID is a Bento served by Ray Serve."""

    BENTOML = "bentoml"
    RAY_SERVE = "ray_serve"
    HYBRID = "hybrid"


@dataclass(kw_only=True)
class AppleSiliconOptimization(CheckedFields):
    """What of an Apple chip is used.

    Attributes:
        enable_mps: compute on the GPU; otherwise on the CPU.
        enable_mlx: allow MLX runners.
        enable_unified_memory: set MLX's wired and cache limits to the machine's memory.
        enable_ane: let Core ML use the Neural Engine.
        thermal_aware: smaller batches while the machine reports that it is hot.
        max_batch_size: the largest batch on an Apple chip.
        chip_type: "M1", "M2", "M3", …; None on any other machine. A service fills it in.
    """

    enable_mps: bool = True
    enable_mlx: bool = True
    enable_unified_memory: bool = True
    enable_ane: bool = False
    thermal_aware: bool = True
    max_batch_size: int = 32
    chip_type: str | None = None

    _rules: ClassVar[Mapping[str, Rule]] = {
        "enable_mps": allow.flag(),
        "enable_mlx": allow.flag(),
        "enable_unified_memory": allow.flag(),
        "enable_ane": allow.flag(),
        "thermal_aware": allow.flag(),
        "max_batch_size": allow.whole_number(1, _MAX_BATCH_SIZE),
        "chip_type": allow.optional(
            allow.text("a chip family such as 'M3'", pattern=r"[A-Z]\d+", max_length=8)
        ),
    }

    def compute_units(self) -> Literal["ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"]:
        """Core ML's name for the units that may compute."""
        if self.enable_ane:
            return "ALL" if self.enable_mps else "CPU_AND_NE"
        return "CPU_AND_GPU" if self.enable_mps else "CPU_ONLY"

    def batch_limit(self, max_batch_size: int, thermal_state: str) -> int:
        """The largest batch to run now, at least 1.

        Args:
            max_batch_size: what the service allows.
            thermal_state: as `mlops.hardware.thermal_state` reports it; "serious" halves the
                batch, "critical" leaves one request at a time.
        """
        limit = max_batch_size
        if self.chip_type is not None:
            limit = min(limit, self.max_batch_size)
        if self.thermal_aware:
            limit //= _THERMAL_DIVISOR.get(thermal_state, 1)
        return max(1, limit)


_SECTIONS: dict[str, type[AppleSiliconOptimization | HTTPOptions | RayOptions]] = {
    "apple_silicon": AppleSiliconOptimization,
    "http": HTTPOptions,
    "ray": RayOptions,
}


def _section(name: str) -> Rule:
    """A field that is a table of its own fields."""
    kind = _SECTIONS[name]

    def accept(value: Any) -> Any:
        if value is None:
            return kind()
        if isinstance(value, Mapping):
            return kind(**_with_text_keys(value, name))
        if not isinstance(value, kind):
            raise TypeError
        return value

    return Rule(f"{kind.__name__} or a table of its fields", accept)


@dataclass(kw_only=True)
class BentoMLConfig(CheckedFields):
    """How a service runs.

    Attributes:
        service_name: the name of the service, of its Bento and of its Ray deployment.
        project_name: the project that the service belongs to.
        model_path: folder, model tag or hub id of the model to serve.
        model_name, model_version: the model's tag in the store.
        model_framework: the library that made the model.
        serving_backend: what runs the service.
        workers: server processes; each loads its own copy of the weights. Under Ray Serve, the
            replicas to start with.
        max_batch_size: requests computed together, at most.
        max_latency_ms: the longest that a request waits for its batch to fill; 0 is no wait.
        max_resident_adapters: adapters that one worker holds in memory; None is as many as fit.
        timeout: seconds until a request is given up and answered with 504.
        stuck_after_s: a model that makes no step for so long, with requests to answer, is taken for
            dead: its worker or replica is replaced. A custom model has `timeout`, where that is
            more.
        host, port: the address to listen on.
        enable_swagger: offer BentoML's page that describes the API.
        enable_metrics: offer `/metrics`.
        cpu_per_worker: cores that one worker computes with; None leaves it to the libraries.
        memory_per_worker_mb: MiB that one worker needs: what is reserved for it, and the most that
            weights made float32 may take; None leaves it open.
        enable_apple_silicon_optimization: use `apple_silicon`'s memory limits, batch limit, Neural
            Engine and thermal awareness.
        apple_silicon: what of an Apple chip is used.
        http: API keys, limits, logs and shutdown.
        ray_serve_enabled: run a BENTOML service on Ray Serve too, as HYBRID does.
        ray_address: the cluster: "auto" (one that runs already), "local" (start one here),
            "HOST:PORT" or "ray://HOST:PORT".
        ray_deployment_name: the deployment's name; by default the service's.
        ray_min_replicas: by default `workers`.
        ray_max_replicas: by default 4, or `ray_min_replicas` when that is more.
        ray: resources, scaling and routes of the replicas.
        labels: kept with the service.

    Raises:
        ConfigError: a field is unknown or holds what it may not.
    """

    service_name: str = "mlops_service"
    project_name: str = "default"
    model_path: str | Path | None = None
    model_name: str | None = None
    model_version: str | None = None
    model_framework: ModelFramework | str = ModelFramework.MLX
    serving_backend: ServingBackend | str = ServingBackend.BENTOML
    workers: int = 1
    max_batch_size: int = 32
    max_latency_ms: int = 10
    max_resident_adapters: int | None = None
    timeout: float = 300
    stuck_after_s: float = 60
    host: str = "127.0.0.1"
    port: int = 3000
    enable_swagger: bool = True
    enable_metrics: bool = True
    cpu_per_worker: float | None = None
    memory_per_worker_mb: int | None = None
    enable_apple_silicon_optimization: bool = True
    apple_silicon: AppleSiliconOptimization = field(default_factory=AppleSiliconOptimization)
    http: HTTPOptions = field(default_factory=HTTPOptions)
    ray_serve_enabled: bool = False
    ray_address: str | None = None
    ray_deployment_name: str | None = None
    ray_min_replicas: int | None = None
    ray_max_replicas: int | None = None
    ray: RayOptions = field(default_factory=RayOptions)
    labels: dict[str, str] = field(default_factory=dict)

    _rules: ClassVar[Mapping[str, Rule]] = {
        "service_name": allow.text(
            f"{_NAME_ALLOWED}, that is no BentoML setting such as 'http'",
            pattern=_NAME,
            max_length=63,
            other_than=_BENTOML_SETTINGS,
        ),
        "project_name": allow.text(),
        "model_path": allow.optional(allow.path()),
        "model_name": allow.optional(allow.text()),
        "model_version": allow.optional(allow.text("text such as '1.0.0', in quotes in a file")),
        "model_framework": allow.choice(ModelFramework),
        "serving_backend": allow.choice(ServingBackend),
        "workers": allow.whole_number(1, 256),
        "max_batch_size": allow.whole_number(1, _MAX_BATCH_SIZE),
        "max_latency_ms": allow.whole_number(0, 600_000),
        "max_resident_adapters": allow.optional(allow.whole_number(1, 1_000_000)),
        "timeout": allow.positive_number(86_400),
        "stuck_after_s": allow.positive_number(86_400),
        "host": allow.host(),
        "port": allow.whole_number(1, 65_535),
        "enable_swagger": allow.flag(),
        "enable_metrics": allow.flag(),
        "cpu_per_worker": allow.optional(allow.positive_number(1024)),
        "memory_per_worker_mb": allow.optional(allow.whole_number(1, 1 << 24)),
        "enable_apple_silicon_optimization": allow.flag(),
        "apple_silicon": _section("apple_silicon"),
        "http": _section("http"),
        "ray_serve_enabled": allow.flag(),
        "ray_address": allow.optional(allow.ray_address()),
        "ray_deployment_name": allow.optional(
            allow.text(_NAME_ALLOWED, pattern=_NAME, max_length=63)
        ),
        "ray_min_replicas": allow.optional(allow.whole_number(1, 1000)),
        "ray_max_replicas": allow.optional(allow.whole_number(1, 1000)),
        "ray": _section("ray"),
        "labels": allow.labels(),
    }

    def __post_init__(self) -> None:
        self._check_together()

    def validate(self) -> None:
        """Check every field again, and those that must agree with each other.

        Assigning checks one field at a time, so two that belong together can be changed in any
        order; `to_bentoml_config` and `to_ray_serve_config` call this before they answer.

        Raises:
            ConfigError: a field holds what it may not, or contradicts another one.
        """
        super().validate()
        self.apple_silicon.validate()
        self.http.validate()
        self.ray.validate()
        self._check_together()

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> BentoMLConfig:
        """The configuration from arguments, the environment, a file and the defaults.

        `apple_silicon`, `http` and `ray` are layered field by field; others are taken whole.

        Args:
            source: a YAML or TOML file, or a table with what such a file would say.
            environ: the environment; by default the process's.

        Raises:
            ConfigError: names the file or variable and the field.
        """
        return cls(**cls.values(source, environ, **arguments))

    @staticmethod
    def values(
        source: str | Path | Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """What `load` makes a configuration of, without the defaults; for `with_changes`.

        Raises:
            ConfigError: names the file or variable and the field.
        """
        table = _checked(source) if isinstance(source, Mapping) else _file(source)
        return _layered(table, _environment(environ), _checked(arguments))

    @classmethod
    def from_file(cls, path: str | Path, environ: Mapping[str, str] | None = None) -> BentoMLConfig:
        """The configuration in a `.yaml`, `.yml` or `.toml` file, under the environment.

        Raises:
            ConfigError: names the file or variable and the field.
        """
        return cls.load(path, environ)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BentoMLConfig:
        """The configuration in a nested table, as `to_dict` or a file gives it.

        A bentofile's `runner: {batching: {enabled, max_batch_size, max_latency_ms}}` is understood;
        `enabled: false` is a `max_batch_size` of 1. The environment is not read.

        Raises:
            ConfigError: a field is unknown or holds what it may not.
        """
        return cls(**_checked(values))

    @classmethod
    def detect(
        cls,
        project_name: str | None = None,
        *,
        hardware: HardwareInfo | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> BentoMLConfig:
        """What suits this machine, under the environment and `overrides`.

        Every worker loads its own weights and computes with all the cores it is given, so there is
        a second one only on an M3 or later, or a Linux CPU of 8 cores and more, that also has
        32 GiB. Batches are 16 on M1 and M2 and below 16 GiB, otherwise 32. The workers, as many as
        are asked for, share the performance cores and half of the memory.

        Args:
            hardware: the machine; by default this one.

        Raises:
            ConfigError: an override or variable is unknown or not allowed.
        """
        if hardware is None:
            from mlops.hardware import detect as detect_hardware

            hardware = detect_hardware()
        if project_name is not None:
            overrides["project_name"] = project_name
        chosen = _layered(_environment(environ), _checked(overrides))
        workers = chosen.get("workers", _suitable_workers(hardware))
        return cls(**_layered(_suitable(hardware, workers), chosen))

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON and YAML types; `from_dict` reads it back."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def changes(self) -> dict[str, Any]:
        """As `to_dict`, what differs from the defaults alone."""
        changed: dict[str, Any] = _difference(self.to_dict(), BentoMLConfig().to_dict())
        return changed

    def with_changes(self, values: Mapping[str, Any]) -> BentoMLConfig:
        """A configuration with these values above its own, section by section.

        Raises:
            ConfigError: a field is unknown or holds what it may not.
        """
        return BentoMLConfig(**_layered(self.to_dict(), _checked(values)))

    def to_bentoml_config(self) -> dict[str, Any]:
        """Keyword arguments for `bentoml.service`, other than `name`.

        BentoML's resources are the service's, so they are the workers' together.

        Raises:
            ConfigError: see `validate`.
        """
        self.validate()
        config: dict[str, Any] = {
            "workers": self.workers,
            "traffic": {"timeout": self.timeout + TIMEOUT_MARGIN_S},
            "metrics": {"enabled": self.enable_metrics},
            "http": {
                "host": "127.0.0.1" if self.host == "localhost" else self.host,
                "port": self.port,
            },
        }
        resources: dict[str, Any] = {}
        if self.cpu_per_worker is not None:
            resources["cpu"] = self.cpu_per_worker * self.workers
            threads = str(max(1, int(self.cpu_per_worker)))
            config["envs"] = [{"name": "OPENBLAS_NUM_THREADS", "value": threads}]
        if self.memory_per_worker_mb is not None:
            resources["memory"] = f"{self.memory_per_worker_mb * self.workers}Mi"
        if resources:
            config["resources"] = resources
        if self.labels:
            config["labels"] = dict(self.labels)
        return config

    def to_ray_serve_config(self) -> dict[str, Any]:
        """Keyword arguments for `ray.serve.deployment`.

        A replica is sent one batch to compute and one that waits; a replica is added when the
        average one has more than a full batch to do. Eight more batches wait in each of Ray's
        proxies; what comes then is a 429.

        Raises:
            ConfigError: the service does not run on Ray Serve, or see `validate`.
        """
        self.validate()
        if not self.uses_ray:
            raise ConfigError(
                f"serving_backend is {self.effective_backend.value!r}; "
                "use 'hybrid' or 'ray_serve' to run on Ray Serve"
            )
        actor: dict[str, Any] = {"num_cpus": self.cpu_per_worker or 1}
        if self.memory_per_worker_mb is not None:
            actor["memory"] = self.memory_per_worker_mb * _MIB
        if self.ray.num_gpus:
            actor["num_gpus"] = self.ray.num_gpus
        if self.ray.resources:
            actor["resources"] = dict(self.ray.resources)
        return {
            "name": self.ray_deployment_name or self.service_name,
            "max_ongoing_requests": 2 * self.max_batch_size,
            "max_queued_requests": 8 * self.max_batch_size,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1},
            "health_check_period_s": _HEALTH_CHECK_S,
            "health_check_timeout_s": 30,
            "graceful_shutdown_timeout_s": self.timeout,
            "graceful_shutdown_wait_loop_s": 1,
            "max_constructor_retry_count": _LOADING_TRIES,
            "max_surge_percent": self.ray.max_surge_percent,
            "ray_actor_options": actor,
            **self.ray_scaling(),
        }

    def ray_scaling(self) -> dict[str, Any]:
        """How many replicas Ray Serve runs: `num_replicas`, or `autoscaling_config`."""
        low, high = self.ray_replicas
        if low == high:
            return {"num_replicas": low}
        delay_s = self.ray.upscale_delay_s
        return {
            "autoscaling_config": {
                "min_replicas": low,
                "initial_replicas": low,
                "max_replicas": high,
                "target_ongoing_requests": self.ray.target_ongoing_requests or self.max_batch_size,
                "upscale_delay_s": delay_s,
                "downscale_delay_s": self.ray.downscale_delay_s,
                "metrics_interval_s": _LOAD_SAMPLE_S,
                "look_back_period_s": max(2 * _LOAD_SAMPLE_S, delay_s),
            }
        }

    @property
    def effective_backend(self) -> ServingBackend:
        """What runs the service, with `ray_serve_enabled` taken into account."""
        backend = ServingBackend(self.serving_backend)
        if backend is ServingBackend.BENTOML and self.ray_serve_enabled:
            return ServingBackend.HYBRID
        return backend

    @property
    def uses_ray(self) -> bool:
        """True when Ray Serve runs the service."""
        return self.effective_backend is not ServingBackend.BENTOML

    @property
    def effective_apple_silicon(self) -> AppleSiliconOptimization:
        """`apple_silicon`, or what is left of it with the optimization off."""
        if self.enable_apple_silicon_optimization:
            return self.apple_silicon
        return replace(
            self.apple_silicon,
            enable_unified_memory=False,
            enable_ane=False,
            thermal_aware=False,
            chip_type=None,
        )

    def batch_limit(self, thermal_state: str) -> int:
        """The largest batch to run now; see `AppleSiliconOptimization.batch_limit`."""
        return self.effective_apple_silicon.batch_limit(self.max_batch_size, thermal_state)

    def require_mlx(self) -> None:
        """Call before an MLX runner is made.

        Raises:
            ConfigError: `apple_silicon.enable_mlx` is False.
        """
        if not self.apple_silicon.enable_mlx:
            raise ConfigError(
                "apple_silicon.enable_mlx = False does not allow an MLX runner; "
                "use True, or a runner of another framework"
            )

    def describe_unhonoured(self, hardware: HardwareInfo) -> list[str]:
        """One sentence for each setting that has no effect on this machine, for `/health`."""
        optimization = self.effective_apple_silicon
        missing = {
            "enable_mps": optimization.enable_mps and not hardware.mps_available,
            "enable_unified_memory": optimization.enable_unified_memory
            and hardware.mlx_backend != "metal",
            "enable_ane": optimization.enable_ane and not hardware.ane_available,
            "thermal_aware": optimization.thermal_aware and hardware.thermal_state == "unknown",
        }
        notes = []
        if any(missing.values()):
            names = ", ".join(name for name, is_missing in missing.items() if is_missing)
            notes.append(f"{names}: this machine does not offer it.")
        if (
            self.enable_apple_silicon_optimization
            and optimization.chip_type is None
            and hardware.chip_type is None
            and optimization.max_batch_size != AppleSiliconOptimization.max_batch_size
            and optimization.max_batch_size < self.max_batch_size
        ):
            notes.append(
                "apple_silicon.max_batch_size: no Apple chip is known here; use max_batch_size."
            )
        cores = (self.cpu_per_worker or 0) * self.workers
        if cores > hardware.cores:
            notes.append(
                f"cpu_per_worker: {count(self.workers, 'worker needs', 'workers need')} {cores:g} "
                f"cores, more than the {hardware.cores} here."
            )
        memory_mb = (self.memory_per_worker_mb or 0) * self.workers
        if 0 < hardware.memory_bytes < memory_mb * _MIB:
            notes.append(
                f"memory_per_worker_mb: {count(self.workers, 'worker needs', 'workers need')} "
                f"{memory_mb} MiB, more than the {hardware.memory_bytes // _MIB} here."
            )
        if self.http.adapter_folder and not self.http.enable_runtime_adapters:
            notes.append("http.adapter_folder: needs http.enable_runtime_adapters.")
        if not self.uses_ray:
            notes += [
                f"{name}: the serving_backend 'bentoml' does not use Ray."
                for name in (
                    "ray_address",
                    "ray_deployment_name",
                    "ray_min_replicas",
                    "ray_max_replicas",
                )
                if getattr(self, name) is not None
            ]
        return notes

    @property
    def ray_replicas(self) -> tuple[int, int]:
        """The fewest and the most replicas on Ray Serve."""
        low = self.ray_min_replicas or self.workers
        return low, self.ray_max_replicas or max(low, _MAX_RAY_REPLICAS)

    def _check_together(self) -> None:
        low, high = self.ray_replicas
        if low > high:
            raise allow.not_allowed(
                "BentoMLConfig.ray_max_replicas",
                high,
                f"at least {low}, which ray_min_replicas or workers asks for",
            )
        if self.http.enable_runtime_adapters and self.workers > 1:
            raise allow.not_allowed(
                "BentoMLConfig.workers",
                self.workers,
                "1 with http.enable_runtime_adapters: a request reaches one worker, and the others "
                "would not know the adapter",
            )
        if self.max_latency_ms >= self.timeout * 1000:
            raise allow.not_allowed(
                "BentoMLConfig.max_latency_ms",
                self.max_latency_ms,
                f"less than the timeout of {self.timeout:g} s, or a longer timeout",
            )


def _plain(value: Any) -> Any:
    """A field's value, or a table of them, in JSON's and YAML's types."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return value.value if isinstance(value, Enum) else value


def _difference(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ; of a section, its fields that differ."""
    return {
        name: _difference(value, others[name]) if name in _SECTIONS else value
        for name, value in values.items()
        if value != others[name]
    }


def _file(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    values = read_file(path)
    try:
        return _checked(values)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _environment(environ: Mapping[str, str] | None) -> dict[str, Any]:
    return read_environment(BentoMLConfig, _SECTIONS, environ)


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of values, each allowed by its field's rule."""
    flat = flatten_batching(_with_text_keys(values, "BentoMLConfig"))
    for name, value in flat.items():
        BentoMLConfig.checked(name, value)
    return flat


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; those fields that are tables win field by field."""
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = values.get(name)
            if isinstance(below, AppleSiliconOptimization | HTTPOptions | RayOptions):
                below = asdict(below)
            if name in _SECTIONS and isinstance(value, Mapping) and below:
                values[name] = {**below, **value}
            else:
                values[name] = value
    return values


def _with_text_keys(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise allow.not_allowed(name, values, "a table of its fields")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{name} has the field {allow.shown(key)}; fields are text")
    return dict(values)


def _suitable_workers(hardware: HardwareInfo) -> int:
    if hardware.memory_bytes < 32 * _GIB:
        return 1
    if hardware.chip_type is not None:
        return 1 if hardware.chip_type in _EARLY_CHIPS else 2
    return 2 if hardware.mlx_backend == "cpu" and hardware.performance_cores >= 8 else 1


def _suitable(hardware: HardwareInfo, workers: int) -> dict[str, Any]:
    """Field values that suit the machine when it runs this many workers."""
    small = hardware.chip_type in _EARLY_CHIPS or hardware.memory_bytes < 16 * _GIB
    batch = 16 if small else 32
    memory_mb = hardware.memory_bytes // 2 // workers // _MIB
    return {
        "workers": workers,
        "max_batch_size": batch,
        "cpu_per_worker": max(1.0, hardware.performance_cores / workers),
        "memory_per_worker_mb": memory_mb or None,  # 0 bytes: the machine did not tell
        "apple_silicon": {"chip_type": hardware.chip_type, "max_batch_size": batch},
    }
