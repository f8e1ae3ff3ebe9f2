"""The metrics of a served model for Prometheus.

    a request is over -> counters and histograms                         `on_request`
    every second, and when asked -> gauges, and counters of the engine   `refresh`
    /metrics -> the sum over all workers, as text                        `render`

With several workers a scrape reaches one of them and must tell of all. prometheus_client then keeps
each worker's values in files of a folder that the server names in `PROMETHEUS_MULTIPROC_DIR` before
a worker starts, and adds them up when it is asked. `metric_files` is for disks that are full.
"""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlops.engine.statistics import BUCKETS_S, MAX_ADAPTERS, OTHER_NAME
from mlops.serving.http.metric_files import num_unwritten, withstand_full_disk
from mlops.serving.http.records import RequestRecord
from mlops.serving.http.request_log import UNLOGGED_ROUTES

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
    from prometheus_client.samples import Sample

    from mlops.serving.http.host import RunnerHost
    from mlops.serving.http.served import ServiceInfo

PLAIN_TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
METRICS_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
TIME_BUCKETS_S = (*BUCKETS_S, 120.0, 300.0)

_LATENCY = "mlops_e2e_request_latency_seconds"
_QUEUE_TIME = "mlops_request_queue_time_seconds"
_UNTIL_FIRST = "mlops_time_to_first_token_seconds"
_BETWEEN = "mlops_time_per_output_token_seconds"
_RUNNING_BY_ADAPTER = "mlops_adapter_requests_running"
_WAITING_BY_ADAPTER = "mlops_adapter_requests_waiting"
_MAX_RUNNING_ADAPTERS = "mlops_max_running_adapters"
_UNWRITTEN = "mlops_metrics_unwritten"
_UNWRITTEN_HELP = "Series that are missing here: a worker's disk has no room for them."


@dataclass(frozen=True)
class _OfEngine:
    """A metric that the engine's statistics hold.

    Attributes:
        path: where they have it.
        over_workers: what is told of several workers, where it is a gauge.
    """

    name: str
    help_text: str
    path: tuple[str, ...]
    over_workers: str = "livesum"


_ENGINE_COUNTERS = (
    _OfEngine(
        "mlops_prompt_tokens_cached",
        "Tokens of prompts that were not computed: the prefix cache had them.",
        ("tokens", "cached"),
    ),
    _OfEngine(
        "mlops_prefill_tokens", "Tokens of prompts that were computed.", ("tokens", "prefill")
    ),
    _OfEngine(
        "mlops_decode_steps",
        "Steps of the running batch; each makes one token for every row.",
        ("steps", "decode"),
    ),
    _OfEngine(
        "mlops_adapter_loads",
        "Adapters that were loaded into memory.",
        ("resident_adapters", "loads"),
    ),
    _OfEngine(
        "mlops_adapter_evictions",
        "Adapters that left the memory for others.",
        ("resident_adapters", "evictions"),
    ),
)

_ENGINE_GAUGES = (
    _OfEngine("mlops_max_num_seqs", "Rows that the running batch may have.", ("max_rows",)),
    _OfEngine(
        _MAX_RUNNING_ADAPTERS,
        "Adapters that one worker's batch may use at a time.",
        ("max_running_adapters",),
        "livemax",
    ),
    _OfEngine(
        "mlops_kv_cache_bytes",
        "Memory of the running requests' KV caches.",
        ("cache", "bytes"),
    ),
    _OfEngine(
        "mlops_kv_cache_budget_bytes",
        "What these caches may take at most.",
        ("cache", "budget_bytes"),
    ),
    _OfEngine(
        "mlops_prefix_cache_bytes",
        "Memory of what the prefix cache keeps of earlier requests.",
        ("prefix_cache", "bytes"),
    ),
    _OfEngine(
        "mlops_adapter_memory_bytes",
        "Memory of the adapters that are loaded.",
        ("resident_adapters", "bytes"),
    ),
    _OfEngine(
        "mlops_adapter_memory_budget_bytes",
        "What adapters may take at most.",
        ("resident_adapters", "budget_bytes"),
    ),
    _OfEngine(
        "mlops_adapters_resident",
        "Adapters in memory; one that two workers hold counts twice.",
        ("resident_adapters", "resident"),
    ),
    _OfEngine(
        "mlops_adapters_registered",
        "Adapters that a request may name.",
        ("resident_adapters", "registered"),
        "livemax",
    ),
)

_OPENMETRICS_KIND = "application/openmetrics-text"
_HISTOGRAM_ORDER = ("_bucket", "_count", "_sum")


class _Collector(Protocol):
    def collect(self) -> Any: ...


class Metrics:
    """The metrics of one service in this process. Its methods are for the event loop, but `render`.

    Names and meanings follow vLLM's where it has the like, with the prefix `mlops_`.

    Attributes:
        on_observed: told of what a histogram takes in: its name, its labels' values, the value.
    """

    def __init__(self, info: ServiceInfo) -> None:
        # Whatever server runs this has said by now where the values of its workers are kept.
        import prometheus_client as prometheus

        self._info = info
        self._folder = os.environ.get(METRICS_FOLDER_VARIABLE)
        if self._folder:
            withstand_full_disk(Path(self._folder))
        self._registry = registry = prometheus.CollectorRegistry()
        self._adapters = _Names(MAX_ADAPTERS)
        self._described: Any = None

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return prometheus.Counter(name, help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str, over_workers: str = "livesum") -> Gauge:
            return prometheus.Gauge(
                name,
                help_text,
                labels,
                registry=registry,
                multiprocess_mode=over_workers,  # type: ignore[arg-type]
            )

        self._unwritten = gauge(_UNWRITTEN, _UNWRITTEN_HELP)
        self.on_observed: Callable[[str, tuple[str, ...], float], None] | None = None
        self._histograms: dict[str, _Children] = {}

        def histogram(name: str, help_text: str, *labels: str) -> None:
            made: Histogram = prometheus.Histogram(
                name, help_text, labels, registry=registry, buckets=TIME_BUCKETS_S
            )
            self._histograms[name] = _Children(made.labels if labels else lambda: made)

        self._requests = _Children(
            counter(
                "mlops_requests",
                "Requests that are over. status: 499 where the client left, and for a stream that "
                "failed what the error would have been before. adapter: empty where no text came.",
                "route",
                "status",
                "adapter",
            ).labels
        )
        histogram(
            _LATENCY,
            "From a request's headers to the last byte of its answer, of those that succeeded.",
            "route",
        )
        histogram(
            _QUEUE_TIME,
            "From a request's submission to the engine to the begin of its prefill.",
        )
        histogram(
            _UNTIL_FIRST,
            "From a request's submission to the engine to its first token.",
        )
        histogram(
            _BETWEEN,
            "Between two tokens of a request, on average, after its first.",
        )
        self._finished = counter(
            "mlops_sequences_finished", "Texts that have ended, by the reason.", "finish_reason"
        )
        self._prompt_tokens = counter(
            "mlops_prompt_tokens", "Tokens of the prompts of requests that have ended.", "adapter"
        )
        self._generation_tokens = counter(
            "mlops_generation_tokens", "Tokens that were generated, of ended requests.", "adapter"
        )
        self._running = gauge("mlops_num_requests_running", "Requests that are being computed.")
        self._waiting = gauge("mlops_num_requests_waiting", "Requests that wait to be computed.")
        self._running_by_adapter = _Children(
            gauge(
                _RUNNING_BY_ADAPTER, "Requests that are being computed, by adapter.", "adapter"
            ).labels
        )
        self._waiting_by_adapter = _Children(
            gauge(_WAITING_BY_ADAPTER, "Requests that wait, by adapter.", "adapter").labels
        )
        self._engine_counters = {one: counter(one.name, one.help_text) for one in _ENGINE_COUNTERS}
        self._engine_gauges = {
            one: gauge(one.name, one.help_text, over_workers=one.over_workers)
            for one in _ENGINE_GAUGES
        }
        self._model_loaded = gauge(
            "mlops_model_loaded", "Workers that have loaded the model and answer."
        )
        self._model_info = gauge(
            "mlops_model_info",
            "The loaded model, as labels; always 1.",
            *_LABELS_OF_MODEL,
            over_workers="livemax",
        )
        self._process = _ProcessMetrics(counter, gauge)
        self._growth = _Growth()

    def on_request(self, record: RequestRecord) -> None:
        """Count a request that is over."""
        adapter = self._label_of(record)
        self._requests[record.route, record.status, adapter].inc()
        if record.status >= 400 or record.route in UNLOGGED_ROUTES:
            return
        self._observe(_LATENCY, record.duration_s, record.route)
        timings = record.timings
        if (queue_ms := timings.get("queue_ms")) is not None:
            self._observe(_QUEUE_TIME, queue_ms / 1000)
        if (first_ms := timings.get("first_token_ms")) is not None:
            self._observe(_UNTIL_FIRST, first_ms / 1000)
        if (per_token_ms := record.time_per_token_ms) is not None:
            self._observe(_BETWEEN, per_token_ms / 1000)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._histograms[name][labels].observe(value)
        if self.on_observed:
            self.on_observed(name, labels, value)

    def collect(self) -> Iterable[Metric]:
        """The metrics of this process, as prometheus_client has them."""
        return self._registry.collect()

    def refresh(self, host: RunnerHost) -> None:
        """Take over what is so now, and what the engine has counted meanwhile."""
        running, waiting, statistics = 0, host.num_waiting, {}
        runner = host.text_runner
        if runner is not None:
            statistics = runner.statistics()
            running = statistics.get("running", 0)
            waiting += statistics.get("waiting", 0)
        elif (batcher := host.batcher) is not None:
            running = batcher.num_running
        self._running.set(running)
        self._waiting.set(waiting)
        self._model_loaded.set(host.runner is not None)
        self._process.refresh()
        if host.runner is not None and host.runner is not self._described:
            self._described = host.runner
            self._model_info.labels(*_labels_of_model(self._info, host.runner)).set(1)
        self._refresh_engine(statistics)
        self._unwritten.set(num_unwritten())

    def _refresh_engine(self, statistics: Mapping[str, Any]) -> None:
        for one, gauge in self._engine_gauges.items():
            gauge.set(_number(statistics, *one.path))
        self._set_by_adapter(self._running_by_adapter, _mapping(statistics, "running_adapters"))
        self._set_by_adapter(self._waiting_by_adapter, _mapping(statistics, "waiting_adapters"))
        for one, counter in self._engine_counters.items():
            self._growth.add_to(counter, one.path, _number(statistics, *one.path))
        finished = _mapping(statistics, "requests", "finished")
        for reason, count in finished.items():
            counter = self._finished.labels(reason)
            self._growth.add_to(counter, ("finished", reason), count)
        for name, counts in _mapping(statistics, "adapters").items():
            label = self._adapters.known(name)
            for metric, key in (
                (self._prompt_tokens, "prompt_tokens"),
                (self._generation_tokens, "completion_tokens"),
            ):
                counter = metric.labels(label)
                self._growth.add_to(counter, (name, key), counts.get(key, 0))

    def _set_by_adapter(self, gauges: _Children, counts: Mapping[str, int]) -> None:
        by_label = collections.Counter[str]()
        for name, count in counts.items():
            by_label[self._adapters.known(name)] += count
        for label in {label for (label,) in gauges} | set(by_label):
            gauges[(label,)].set(by_label[label])

    def _label_of(self, record: RequestRecord) -> str:
        """The adapter's name, once the runner has answered with it; a stranger makes up others."""
        name = record.adapter_label
        if not name or record.status < 400:
            return self._adapters.known(name)
        return self._adapters.if_known(name)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics of all workers as text, and its content type. From any thread.

        Args:
            accept: the request's header `Accept`; with `application/openmetrics-text` in it the
                text is OpenMetrics, else Prometheus's own.
        """
        from prometheus_client.exposition import choose_encoder

        kind = OPENMETRICS if _OPENMETRICS_KIND in accept.lower() else PLAIN_TEXT
        # Our names need no escaping, and its underscores would change them in some lines only.
        encode, _ = choose_encoder(f"{kind}; escaping=allow-utf-8")
        return encode(_Sum(self._registry, self._folder)), kind


def wants_prometheus(accept: str) -> bool:
    """Whether a header `Accept` asks for Prometheus's or OpenMetrics' text rather than for JSON.

    What is equally welcome is answered in JSON, and so is a browser.
    """
    text = other = 0.0
    for entry in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((_quality(one[2:]) for one in parameters if one.startswith("q=")), 1.0)
        if kind in {"text/plain", _OPENMETRICS_KIND}:
            text = max(text, quality)
        elif kind in {"*/*", "application/*", "application/json", "text/html"}:
            other = max(other, quality)
    return text > other


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


@dataclass
class _Sum:
    """A collector of what all workers have counted."""

    registry: CollectorRegistry
    folder: str | None

    def collect(self) -> list[Metric]:
        families = {family.name: family for family in self._source().collect()}
        for family in families.values():
            # When a series began is not worth a series of its own.
            samples = [one for one in family.samples if not one.name.endswith("_created")]
            if family.type == "histogram":
                samples.sort(key=_histogram_order)
            family.samples = samples
        return [families[name] for name in sorted(families)] + list(_derived(families))

    def _source(self) -> _Collector:
        if self.folder is None or not Path(self.folder).is_dir():  # somebody cleaned up
            return self.registry
        from prometheus_client.multiprocess import MultiProcessCollector

        _forget_dead_workers(Path(self.folder))
        collector: _Collector = MultiProcessCollector(None, self.folder)  # type: ignore[no-untyped-call]
        return collector


def _derived(families: Mapping[str, Metric]) -> Iterator[Metric]:
    """What follows from the sums, and cannot be added up itself."""
    from prometheus_client.core import GaugeMetricFamily

    if _UNWRITTEN not in families:  # it is one of them
        yield GaugeMetricFamily(_UNWRITTEN, _UNWRITTEN_HELP, num_unwritten())
    used = _values(families, "mlops_kv_cache_bytes").get("", 0.0)
    budget = _values(families, "mlops_kv_cache_budget_bytes").get("", 0.0)
    yield GaugeMetricFamily(
        "mlops_kv_cache_usage_perc",
        "How much of the KV caches' budget is used: 1 is all.",
        used / budget if budget else 0.0,
    )
    max_running = _values(families, _MAX_RUNNING_ADAPTERS).get("", 0.0)
    if max_running:
        # What Kubernetes' inference gateways read. The value is when it was so: with one series
        # for each set of adapters, as vLLM has it, the newest counts; here there is only that one.
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        names = [
            ",".join(name for name, count in _values(families, one).items() if count and name)
            for one in (_RUNNING_BY_ADAPTER, _WAITING_BY_ADAPTER)
        ]
        info.add_metric([str(int(max_running)), *names], time.time())
        yield info


def _values(families: Mapping[str, Metric], name: str) -> dict[str, float]:
    """Values by adapter, or by "" where there is no label; without those counted together."""
    samples = families[name].samples if name in families else []
    found = {sample.labels.get("adapter", ""): sample.value for sample in samples}
    return {adapter: found[adapter] for adapter in sorted(found) if adapter != OTHER_NAME}


def _histogram_order(sample: Sample) -> tuple[list[tuple[str, str]], int, float]:
    """The order of the exposition formats, which the sum over workers does not keep."""
    labels = sorted((name, value) for name, value in sample.labels.items() if name != "le")
    kind = next(n for n, end in enumerate(_HISTOGRAM_ORDER) if sample.name.endswith(end))
    return labels, kind, float(sample.labels.get("le", 0))


def _forget_dead_workers(folder: Path) -> None:
    """Take the gauges of workers that were killed out of the sums; what they counted stays."""
    from prometheus_client.multiprocess import mark_process_dead

    for process_id in {path.stem.rpartition("_")[2] for path in folder.glob("gauge_live*.db")}:
        if process_id.isdigit() and not _is_alive(int(process_id)):
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                mark_process_dead(int(process_id), str(folder))  # type: ignore[no-untyped-call]


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _Children(dict[tuple[Any, ...], Any]):
    """The series of one metric by the values of its labels; quicker than `labels` each time."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __missing__(self, labels: tuple[Any, ...]) -> Any:
        child = self[labels] = self._make(*labels)
        return child


class _Names:
    """Adapters that have labels of their own; those beyond `limit` are told together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = {""}

    def known(self, name: str) -> str:
        """The label of a name that the runner knows."""
        if name not in self._names and len(self._names) < self._limit:
            self._names.add(name)
        return self.if_known(name)

    def if_known(self, name: str) -> str:
        """The label of a name that a stranger may have made up."""
        return name if name in self._names else OTHER_NAME


@dataclass
class _Growth:
    """Feeds counters from counts that somebody else keeps, and that begin at 0 with each load."""

    _seen: dict[tuple[str, ...], float] = field(default_factory=dict)

    def add_to(self, counter: Any, key: tuple[str, ...], count: float) -> None:
        seen = self._seen.get(key, 0.0)
        if count > seen:
            counter.inc(count - seen)
        elif count < seen:
            counter.inc(count)
        self._seen[key] = count


class _ProcessMetrics:
    """What the workers take of the machine, under the names that every client library uses."""

    def __init__(self, counter: Callable[..., Any], gauge: Callable[..., Any]) -> None:
        import psutil  # type: ignore[import-untyped]

        self._process = psutil.Process()
        self._growth = _Growth()
        self._cpu = counter("process_cpu_seconds", "CPU time of the workers.")
        self._memory = gauge("process_resident_memory_bytes", "Resident memory of the workers.")
        self._files = gauge("process_open_fds", "Open file descriptors of the workers.")
        self._started = gauge(
            "process_start_time_seconds",
            "When the first of the workers started, as a Unix time.",
            over_workers="livemin",
        )

    def refresh(self) -> None:
        with self._process.oneshot():
            times = self._process.cpu_times()
            self._growth.add_to(self._cpu, ("cpu",), times.user + times.system)
            self._memory.set(self._process.memory_info().rss)
            self._files.set(self._process.num_fds())
            self._started.set(self._process.create_time())


_LABELS_OF_MODEL = (
    *("service_name", "project_name", "model_type", "model_tag", "digest"),
    *("architecture", "device", "layout"),
)


def _labels_of_model(info: ServiceInfo, runner: Any) -> list[str]:
    describe = getattr(runner, "describe", None)
    facts: dict[str, Any] = describe() if describe else {}
    for name in _LABELS_OF_MODEL:
        facts[name] = getattr(info, name, None) or facts.get(name)
    return [str(facts[name] or "") for name in _LABELS_OF_MODEL]


def _number(statistics: Mapping[str, Any], *path: str) -> float:
    value = _at(statistics, path)
    return value if isinstance(value, int | float) else 0


def _mapping(statistics: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    value = _at(statistics, path)
    return value if isinstance(value, Mapping) else {}


def _at(statistics: Mapping[str, Any], path: Collection[str]) -> Any:
    value: Any = statistics
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
