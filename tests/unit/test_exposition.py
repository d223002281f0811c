"""The text that Prometheus reads: each family once, labels escaped, names that do not change."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from prometheus import promtool, require_prometheus
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from raypg.alert_rules import RULES
from raypg.core.pool_metrics import GAUGES, PoolMetrics
from raypg.core.sketch import Sketch
from raypg.exposition import families, render
from raypg.grafana_board import board, expressions

NOT_AS_PROMETHEUS_WOULD_NAME_THEM = {
    "connection_pool_query_execution_ms",
    "connection_pool_connection_acquisition_ms",
    "connection_pool_connection_creation_ms",
    "connection_pool_health_check_duration_ms",
    "connection_pool_fetch_ms",
    "db_client_connection_count",
}
"""The guide's, which are in milliseconds, and OpenTelemetry's word for a level."""

STRANGE = 'SEL"ECT\\\n'


def snapshot(**more: Any) -> dict[str, Any]:
    metrics = PoolMetrics(60, 0.0)
    metrics.join(0, "life", 0.0)
    sketch = Sketch()
    sketch.add(0.02, 90)
    sketch.add(2.0, 10)
    buckets, seconds = sketch.take()
    metrics.apply(
        0,
        "life",
        [
            {
                "seq": 1,
                "age": 0.0,
                "seconds": 1.0,
                "counts": {"queries": 100, "errors": 5, "acquired": 100},
                "times": {"wait": ({0: 100}, 100.0)},
                "groups": [("aabb", more.get("command", "SELECT"), "select $1", buckets, seconds, 5)],
                "floor": 0.0,
                "errors": {("query_error", "22012"): 5},
                "recent": [],
                "gauges": {**dict.fromkeys(GAUGES, 2.0), "max_connections": 10.0},
            }
        ],
        1.0,
    )
    return {
        **metrics.snapshot(1.0),
        "circuit_breaker": {"state": "open", "forced": False},
        "alerts": [("Slow", "warning", True), ("Slow", "warning", False), ("Down", "critical", False)],
    }


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def test_what_the_guide_names() -> None:
    text = render({"production": snapshot()})
    assert value(text, "connection_pool_error_rate", pool="production") == 0.05
    p95 = value(text, "connection_pool_query_execution_ms", pool="production", quantile="0.95")
    assert p95 == pytest.approx(2000, rel=0.01)
    assert value(text, "connection_pool_query_execution_ms_count", pool="production") == 100
    assert value(text, "connection_pool_circuit_breaker_state", pool="production", state="open") == 1
    assert value(text, "connection_pool_circuit_breaker_state", pool="production", state="closed") == 0
    assert value(text, "connection_pool_queries_total", pool="production", type="SELECT") == 100
    errors = {"pool": "production", "category": "query_error", "sqlstate": "22012"}
    assert value(text, "connection_pool_query_errors_total", **errors) == 5
    assert value(text, "connection_pool_utilization", pool="production") == 0.2


def test_well_formed_names_beside_them() -> None:
    text = render({"p": snapshot()})
    labels = {"db_client_connection_pool_name": "p", "db_system_name": "postgresql", "db_operation_name": "SELECT"}
    name = "db_client_operation_duration_seconds"
    assert value(text, f"{name}_bucket", le="0.05", **labels) == 90
    assert value(text, f"{name}_bucket", le="5.0", **labels) == 100
    assert value(text, f"{name}_bucket", le="+Inf", **labels) == value(text, f"{name}_count", **labels) == 100
    assert value(text, f"{name}_sum", **labels) == pytest.approx(21.8)
    pool = {"db_client_connection_pool_name": "p"}
    assert value(text, "db_client_connection_count", db_client_connection_state="used", **pool) == 2
    assert value(text, "db_client_connection_max", **pool) == 10


def test_alerts() -> None:
    text = render({"p": snapshot()})
    assert value(text, "raypg_alert_firing", pool="p", alertname="Slow", severity="warning") == 1
    assert value(text, "raypg_alert_firing", pool="p", alertname="Down", severity="critical") == 0


def test_several_pools_share_each_family() -> None:
    text = render({name: snapshot() for name in ("a", "b", "c")})
    types = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(types) == len(set(types))
    assert text.endswith("\n")
    assert [value(text, "connection_pool_info", pool=name) for name in ("a", "b", "c")] == [1, 1, 1]


def test_labels_are_escaped() -> None:
    text = render({"p": snapshot(command=STRANGE)})
    assert value(text, "connection_pool_queries_total", pool="p", type=STRANGE) == 100


def test_prometheus_client_writes_the_same() -> None:
    known = {
        "a": snapshot(),
        "b": snapshot(command=STRANGE),
        "c": {**snapshot(), "gauges": dict.fromkeys(GAUGES, 1e15)},
    }
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collected(families(known)))
    theirs, ours = generate_latest(registry).decode(), render(known)
    of_ours, of_theirs = ({key: repr(value) for key, value in samples(text).items()} for text in (ours, theirs))
    assert of_ours == of_theirs  # by repr, as NaN is not equal to itself
    comments = [[line for line in text.splitlines() if line.startswith("#")] for text in (ours, theirs)]
    assert comments[0] == comments[1]


class Collected(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics

    def describe(self) -> list[Metric]:
        return []


def test_a_pool_that_has_done_nothing() -> None:
    known = {**PoolMetrics(60, 0.0).snapshot(0.0), "circuit_breaker": {"state": None, "forced": False}, "alerts": []}
    text = render({"p": known})
    assert value(text, "connection_pool_error_rate", pool="p") == 0.0
    assert str(value(text, "connection_pool_query_execution_ms", pool="p", quantile="0.95")) == "nan"
    assert render({}).endswith("\n")


def test_promtool_reads_it() -> None:
    done = promtool("check", "metrics", text=render({"a": snapshot(), "b": snapshot(command=STRANGE)}))
    assert done.returncode in (0, 3), done.stderr
    complaints = {line.split()[0] for line in (done.stdout + done.stderr).splitlines()}
    assert complaints == NOT_AS_PROMETHEUS_WOULD_NAME_THEM


def series_of(expression: str) -> set[str]:
    """The names of series in an expression of PromQL."""
    return set(re.findall(r"\b(?:connection_pool|db_client|raypg)_\w+", expression))


def exported() -> set[str]:
    return {name for name, _ in samples(render({"p": snapshot()}))} | {"raypg_metrics_up"}


def test_the_board_names_exported_series_only() -> None:
    whole = json.loads(board())
    assert len(whole["panels"]) == len({panel["title"] for panel in whole["panels"]}) > 10
    shown = [target["expr"] for panel in whole["panels"] for target in panel["targets"]]
    assert shown == expressions()
    for expression in shown:
        assert series_of(expression)
        assert series_of(expression) <= exported()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in whole["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in whole["panels"])


def test_the_rules_name_exported_series_only() -> None:
    shown = [rule["expr"] for rule in yaml.safe_load(RULES)["groups"][0]["rules"]]
    assert len(shown) == 8
    named = set().union(*map(series_of, shown))
    assert named - exported() == {"connection_pool_replica_lag_seconds"}  # of pools with replicas


def test_prometheus_reads_the_expressions_of_the_board(tmp_path: Any) -> None:
    require_prometheus()
    rules = "".join(
        f"      - record: x:{number}\n        expr: {json.dumps(expression.replace('$pool', '.*'))}\n"
        for number, expression in enumerate(expressions())
    )
    file = tmp_path / "board.yml"
    file.write_text(f"groups:\n  - name: board\n    rules:\n{rules}")
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stderr
