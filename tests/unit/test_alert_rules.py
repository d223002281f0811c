"""The alert rules are accepted by Prometheus, fire when they should, and are silent when they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus import promtool

from raypg.alert_rules import RULES

POOL = '{pool="production"}'
UP = f"connection_pool_info{POOL}"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "alerts.yml"
    file.write_text(RULES)
    return file


def test_promtool_accepts_them(rules: Path) -> None:
    done = promtool("check", "rules", str(rules))
    assert done.returncode == 0, done.stderr
    assert "8 rules found" in done.stdout


def fires(rules: Path, alert: str, after: str, series: dict[str, str], labels: str | None) -> None:
    """promtool says that *alert* fires after a time with these labels, or (``None``) that it does not."""
    expected = "" if labels is None else f"          - exp_labels: {labels}\n"
    inputs = "".join(f"      - series: '{name}'\n        values: '{values}'\n" for name, values in series.items())
    test = rules.with_name("test.yml")
    # Annotations are compared too if there are any: those of this copy are left out.
    bare = "\n".join(line for line in RULES.splitlines() if not line.strip().startswith(("summary:", "description:")))
    rules.write_text(bare.replace("        annotations:\n", "") + "\n")
    test.write_text(
        f"rule_files: [{rules}]\nevaluation_interval: 1m\ntests:\n"
        f"  - interval: 1m\n    input_series:\n{inputs}"
        f"    alert_rule_test:\n      - alertname: {alert}\n        eval_time: {after}\n        exp_alerts:\n{expected}"
    )
    done = promtool("test", "rules", str(test))
    assert done.returncode == 0, done.stdout + done.stderr


CASES = [
    ("DatabaseErrorRateHigh", "6m", "connection_pool_error_rate" + POOL, "0.06x30", "critical", ""),
    (
        "DatabaseSlowQueries",
        "11m",
        'connection_pool_query_execution_ms{pool="production", quantile="0.95"}',
        "1200x30",
        "warning",
        ', quantile: "0.95"',
    ),
    (
        "DatabaseCircuitBreakerOpen",
        "2m",
        'connection_pool_circuit_breaker_state{pool="production", state="open"}',
        "1x30",
        "critical",
        "",
    ),
    ("DatabasePoolExhausted", "6m", "connection_pool_exhaustion_events_total" + POOL, "0+3x30", "critical", ""),
    (
        "DatabaseReplicaLag",
        "6m",
        'connection_pool_replica_lag_seconds{pool="production", replica="r1"}',
        "45x30",
        "warning",
        ", replica: r1",
    ),
    (
        "DatabasePoolWorkerDown",
        "2m",
        'connection_pool_worker_up{pool="production", worker="0"}',
        "0x30",
        "critical",
        ', worker: "0"',
    ),
]


@pytest.mark.parametrize(("alert", "after", "series", "values", "severity", "more"), CASES)
def test_each_fires(rules: Path, alert: str, after: str, series: str, values: str, severity: str, more: str) -> None:
    first, _, count = values.partition("x")
    start = first if "+" in first else f"{first}+0"
    labels = f"{{severity: {severity}, pool: production{more}}}"
    fires(rules, alert, after, {UP: "1+0x30", series: f"{start}x{count}"}, labels)


@pytest.mark.parametrize(("most", "used"), [(10, 0.9), (100, 0.95)])
def test_saturation_is_full_use_with_callers_that_wait(rules: Path, most: int, used: float) -> None:
    use, depth = "connection_pool_utilization" + POOL, "connection_pool_queue_depth" + POOL
    full = {UP: "1+0x30", use: f"{used}+0x30", "connection_pool_max_connections" + POOL: f"{most}+0x30"}
    labels = "{severity: warning, pool: production}"
    fires(rules, "DatabasePoolSaturated", "6m", {**full, depth: "4+0x30"}, labels)
    fires(rules, "DatabasePoolSaturated", "6m", {**full, depth: "0+0x30"}, None)


def test_no_data_is_an_alert(rules: Path) -> None:
    fires(rules, "DatabaseMetricsMissing", "8m", {"something_else": "1+0x30"}, "{severity: warning}")
    up = {UP: "1+0x30", "raypg_metrics_up": "0+0x30"}
    fires(rules, "DatabaseMetricsMissing", "8m", up, "{severity: warning}")


@pytest.mark.parametrize(
    ("alert", "series", "values"),
    [
        ("DatabaseErrorRateHigh", "connection_pool_error_rate" + POOL, "0.04+0x30"),
        ("DatabaseErrorRateHigh", "connection_pool_error_rate" + POOL, "0.5 0.5 0 0.5 0.5 0.5 0 0.5 0.5 0.5 0"),
        ("DatabaseSlowQueries", 'connection_pool_query_execution_ms{pool="production", quantile="0.95"}', "NaN+0x30"),
        ("DatabaseSlowQueries", 'connection_pool_query_execution_ms{pool="production", quantile="0.99"}', "5000+0x30"),
        ("DatabasePoolExhausted", "connection_pool_exhaustion_events_total" + POOL, "7+0x30"),
        ("DatabaseMetricsMissing", "raypg_metrics_up", "1+0x30"),
    ],
)
def test_a_calm_day_is_silent(rules: Path, alert: str, series: str, values: str) -> None:
    fires(rules, alert, "11m", {UP: "1+0x30", series: values}, None)
