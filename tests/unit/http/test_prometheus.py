from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest
from echo_runner import EchoRunner
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from text_runner import ScriptedRunner

from mlops.engine.statistics import EngineStatistics
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http import prometheus as prometheus_module
from mlops.serving.http.prometheus import Metrics, wants_prometheus
from mlops.serving.http.records import RequestRecord
from mlops.serving.runner.base import Prediction

LONG_S = 30.0
INFO = ServiceInfo("my_service", "my_project", "mlx", model_tag="tiny:1.0.0", digest="sha256:1")
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
Serving = Callable[..., TestClient]
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


class CountingRunner(ScriptedRunner):
    """A text runner with an engine's counters."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = EngineStatistics()
        self.now: dict[str, Any] = {}

    def statistics(self) -> dict[str, Any]:
        return {
            **self.counts.snapshot(),
            "running": 3,
            "waiting": 1,
            "max_rows": 8,
            "max_running_adapters": 4,
            "cache": {"bytes": 25, "budget_bytes": 100},
            "resident_adapters": {"bytes": 7, "resident": 2, "registered": 5, "loads": 6},
            **self.now,
        }

    def describe(self) -> dict[str, Any]:
        return {"architecture": "llama", "device": "cpu", "layout": None}


@pytest.fixture
def serving() -> Iterator[Serving]:
    hosts: list[RunnerHost] = []

    def serve(runner: EchoRunner, settings: HTTPSettings | None = None) -> TestClient:
        host = RunnerHost(lambda: runner)
        hosts.append(host)
        host.start()
        give_up = time.monotonic() + LONG_S
        while host.status == "loading":
            assert time.monotonic() < give_up
            time.sleep(0.002)
        app = create_app(Served(host, INFO, settings or HTTPSettings()))
        return TestClient(app, raise_server_exceptions=False)

    yield serve
    for host in hosts:
        host.stop()


def values_in(text: str) -> Values:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def rendered(metrics: Metrics) -> Values:
    return values_in(metrics.render("text/plain")[0].decode())


def at(values: Values, name: str, **labels: str) -> float:
    return values[name, frozenset(labels.items())]


def record(**fields: Any) -> RequestRecord:
    return RequestRecord("id", **{"status": 200, "route": "/predict", **fields})


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (OPENMETRICS, "application/openmetrics-text"),
        ("application/openmetrics-text", "application/openmetrics-text"),
        ("text/plain", "text/plain"),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "text/plain"),
        ("*/*", "application/json"),
        ("", "application/json"),
        ("text/html,text/plain", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("text/plain;q=0", "application/json"),
        ("text/plain;q=nan", "application/json"),
    ],
)
def test_prometheus_gets_its_text(serving: Serving, accept: str, kind: str) -> None:
    response = serving(EchoRunner()).get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    assert ("mlops_num_requests_running" in response.text) is (kind != "application/json")


@pytest.mark.parametrize("accept", ["*/*", "application/json", OPENMETRICS])
def test_its_own_address_always_gives_text(serving: Serving, accept: str) -> None:
    text = serving(EchoRunner()).get("/metrics/prometheus", headers={"accept": accept}).text
    assert "mlops_num_requests_running" in text


@given(st.text())
def test_any_accept_is_taken(accept: str) -> None:
    assert wants_prometheus(accept) in {True, False}


def test_they_can_be_turned_off(serving: Serving) -> None:
    client = serving(EchoRunner(), HTTPSettings(enable_metrics=False))
    for path in ("/metrics", "/metrics/prometheus"):
        assert client.get(path, headers={"accept": "text/plain"}).status_code == 404


def test_requests_are_counted(serving: Serving) -> None:
    client = serving(EchoRunner())
    for fields in ({"text": "a"}, {"text": "b"}, {"adapter": "made-up"}, {"text": "crash"}):
        client.post("/predict", json=fields)
    client.get("/made/up")
    values = values_in(client.get("/metrics/prometheus").text)
    counted = {
        (labels["route"], labels["status"], labels["adapter"]): value
        for (name, pairs), value in values.items()
        if name == "mlops_requests_total" and (labels := dict(pairs))
    }
    assert counted == {
        ("/predict", "200", ""): 2,
        ("/predict", "404", ""): 1,
        ("/predict", "500", ""): 1,
        ("other", "404", ""): 1,
    }
    latency = "mlops_e2e_request_latency_seconds"
    assert at(values, f"{latency}_count", route="/predict") == 2
    assert at(values, f"{latency}_bucket", route="/predict", le="+Inf") == 2


def test_both_formats_are_well_formed(serving: Serving) -> None:
    client = serving(CountingRunner())
    client.post("/predict", json={"text": "a"})
    plain = client.get("/metrics", headers={"accept": "text/plain"}).text
    strict = client.get("/metrics", headers={"accept": OPENMETRICS}).text
    families = {one.name: one for one in text_string_to_metric_families(plain)}
    strictly = {one.name: one for one in openmetrics.text_string_to_metric_families(strict)}
    assert set(families) == set(strictly)
    assert all(one.documentation for one in families.values())
    assert not any("_created" in sample.name for one in families.values() for sample in one.samples)


def test_what_the_engine_says(serving: Serving) -> None:
    runner = CountingRunner()
    client = serving(runner)
    for adapter in (None, "formal"):
        runner.counts.on_submit(adapter)
        runner.counts.on_finish(
            adapter,
            "stop",
            prompt_tokens=3,
            completion_tokens=5,
            queue_s=0.1,
            first_token_s=0.2,
            total_s=0.3,
        )
    runner.counts.on_cached(2)
    runner.now = {"running_adapters": {"formal": 2}, "waiting_adapters": {"casual": 1}}
    for _ in range(2):  # what is counted elsewhere is not counted again
        values = values_in(client.get("/metrics/prometheus").text)
        assert at(values, "mlops_num_requests_running") == 3
        assert at(values, "mlops_num_requests_waiting") == 1
        assert at(values, "mlops_prompt_tokens_total", adapter="formal") == 3
        assert at(values, "mlops_generation_tokens_total", adapter="base") == 5
        assert at(values, "mlops_prompt_tokens_cached_total") == 2
        assert at(values, "mlops_sequences_finished_total", finish_reason="stop") == 2
        assert at(values, "mlops_kv_cache_usage_perc") == 0.25
        assert at(values, "mlops_adapter_memory_bytes") == 7
        assert at(values, "mlops_adapters_registered") == 5
        assert at(values, "mlops_adapter_loads_total") == 6
        assert at(values, "mlops_adapter_requests_running", adapter="formal") == 2
        assert at(values, "mlops_model_loaded") == 1
        assert at(values, "process_resident_memory_bytes") > 1_000_000


def test_what_an_inference_gateway_reads(serving: Serving) -> None:
    runner = CountingRunner()
    client = serving(runner)
    runner.now = {"running_adapters": {"b": 2, "a": 1}, "waiting_adapters": {"c": 1}}
    before_s = time.time()
    for running, waiting in (("a,b", "c"), ("", "")):
        values = values_in(client.get("/metrics/prometheus").text)
        told = {
            labels: value for (name, labels), value in values.items() if name.startswith("vllm:")
        }
        labels = {
            "max_lora": "4",
            "running_lora_adapters": running,
            "waiting_lora_adapters": waiting,
        }
        assert list(told) == [frozenset(labels.items())]
        assert before_s <= told[frozenset(labels.items())] <= time.time()
        runner.now = {}


def test_a_model_without_adapters_says_nothing_of_them(serving: Serving) -> None:
    assert "vllm:" not in serving(EchoRunner()).get("/metrics/prometheus").text


def test_the_model_is_told(serving: Serving) -> None:
    values = values_in(serving(CountingRunner()).get("/metrics/prometheus").text)
    labels = {
        "service_name": "my_service",
        "project_name": "my_project",
        "model_type": "mlx",
        "model_tag": "tiny:1.0.0",
        "digest": "sha256:1",
        "architecture": "llama",
        "device": "cpu",
        "layout": "",
    }
    assert at(values, "mlops_model_info", **labels) == 1


def test_counters_go_on_when_the_engine_begins_anew() -> None:
    host, runner = RunnerHost(EchoRunner), CountingRunner()
    runner.load_model()
    host.runner = host.text_runner = runner
    metrics = Metrics(INFO)
    for expected in (4, 5):
        for _ in range(expected if expected == 4 else 1):
            runner.counts.on_cached(1)
        metrics.refresh(host)
        assert at(rendered(metrics), "mlops_prompt_tokens_cached_total") == expected
        runner.counts = EngineStatistics()


PREDICTION: Prediction = {
    "adapter": "formal",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 3, "completion_tokens": 12},
    "timings": {"queue_ms": 3.0, "first_token_ms": 20.0, "total_ms": 120.0},
    "choices": [{}, {}],
}


def test_times_of_a_generation() -> None:
    metrics = Metrics(INFO)
    answered = record()
    answered.note(PREDICTION)
    metrics.on_request(answered)
    values = rendered(metrics)
    assert at(values, "mlops_request_queue_time_seconds_sum") == pytest.approx(0.003)
    assert at(values, "mlops_time_to_first_token_seconds_sum") == pytest.approx(0.02)
    # 100 ms for the 5 later tokens of each of the 2 texts
    assert at(values, "mlops_time_per_output_token_seconds_sum") == pytest.approx(0.02)
    assert at(values, "mlops_requests_total", route="/predict", status="200", adapter="formal") == 1


def test_another_exporter_is_told_of_all_that_histograms_take_in() -> None:
    metrics = Metrics(INFO)
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    metrics.on_observed = lambda name, labels, value: sums.setdefault((name, labels), []).append(
        value
    )
    for duration_s in (0.5, 0.25):
        answered = record(duration_s=duration_s)
        answered.note(PREDICTION)
        metrics.on_request(answered)
    metrics.on_request(record(status=504, timings={"queue_ms": 3.0}))
    taken_in = {
        sample.name.removesuffix("_sum"): sample.value
        for family in metrics.collect()
        if family.type == "histogram"
        for sample in family.samples
        if sample.name.endswith("_sum")
    }
    assert sums["mlops_e2e_request_latency_seconds", ("/predict",)] == [0.5, 0.25]
    assert {name: pytest.approx(sum(values)) for (name, _), values in sums.items()} == taken_in
    assert len(taken_in) == 4


def test_failures_are_in_no_histogram() -> None:
    metrics = Metrics(INFO)
    metrics.on_request(record(status=504, timings={"queue_ms": 3.0}))
    metrics.on_request(record(route="/livez"))
    values = rendered(metrics)
    assert at(values, "mlops_request_queue_time_seconds_count") == 0
    assert not any(name.startswith("mlops_e2e") for name, _ in values)


def test_names_that_strangers_make_up_get_no_series() -> None:
    metrics = Metrics(INFO)
    for number in range(1000):
        metrics.on_request(record(status=404, adapter=f"made-up-{number}"))
    metrics.on_request(record(adapter="formal"))
    metrics.on_request(record(status=429, adapter="formal"))
    counted = {
        dict(labels)["adapter"]: value
        for (name, labels), value in rendered(metrics).items()
        if name == "mlops_requests_total" and dict(labels)["status"] != "200"
    }
    assert counted == {"other": 1000, "formal": 1}


def test_the_names_of_adapters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus_module, "MAX_ADAPTERS", 5)
    metrics = Metrics(INFO)
    for number in range(20):
        metrics.on_request(record(adapter=f"adapter-{number}"))
    counted = [
        value for (name, _), value in rendered(metrics).items() if name == "mlops_requests_total"
    ]
    assert (len(counted), sum(counted)) == (5, 20)


@given(st.text(min_size=1))
def test_any_name_can_be_a_label(name: str) -> None:
    metrics = Metrics(INFO)
    metrics.on_request(record(adapter=name))
    text, _ = metrics.render(OPENMETRICS)
    labels = [
        sample.labels["adapter"]
        for family in openmetrics.text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == "mlops_requests_total"
    ]
    assert labels == [name]


def test_the_dashboard_shows_what_there_is(serving: Serving) -> None:
    """Every name in a query is one that is exported, with the labels that it has."""
    runner = CountingRunner()
    runner.now = {"running_adapters": {"a": 1}, "waiting_adapters": {"b": 1}}
    runner.counts.on_submit(None)
    runner.counts.on_finish(
        None,
        "stop",
        prompt_tokens=1,
        completion_tokens=2,
        queue_s=0.1,
        first_token_s=0.1,
        total_s=1,
    )
    client = serving(runner)
    client.post("/predict", json={"text": "a"})
    values = values_in(client.get("/metrics/prometheus").text)
    labels_of: dict[str, set[str]] = {}
    for name, labels in values:
        labels_of.setdefault(name, {"job", "instance"}).update(dict(labels))
    queries = list(queries_of(json.loads(dashboard())))
    assert len(queries) > 15
    for query in queries:
        names = re.findall(r"(?:mlops|process)_\w+|vllm:\w+", query)
        assert names
        assert set(names) <= set(labels_of), query
        used = {
            label.strip()
            for group in re.findall(r"by \(([^)]*)\)", query)
            for label in group.split(",")
        } | set(re.findall(r"[{,]\s*(\w+)\s*[=!]", query))
        assert used <= set.union(*(labels_of[name] for name in names)), query


def dashboard() -> str:
    return resources.files("mlops.dashboard").joinpath("grafana.json").read_text("utf-8")


def queries_of(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "expr" in part:
            yield part["expr"]
        for one in part.values():
            yield from queries_of(one)
    elif isinstance(part, list):
        for one in part:
            yield from queries_of(one)


def test_the_dashboard_asks_where_its_data_are() -> None:
    board = json.loads(dashboard())
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
