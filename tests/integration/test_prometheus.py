"""A real Prometheus scrapes a running pool; Ray's own metrics have the same; PostgreSQL has counted the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import ray
from pgserver import main_server, system_server
from pools import figures, own_pool
from prometheus import require_prometheus
from prometheus_client.parser import text_string_to_metric_families
from waiting import eventually

from raypg import UnavailableError, WorkflowConnectionPool, cluster
from raypg.alerts_access import add_alert, delete_alert
from raypg.metrics_server import serve

GUIDE = """
groups:
  - name: guide
    rules:
      - alert: DatabaseErrorRateHigh
        expr: connection_pool_error_rate{pool="production"} > 0.05
        for: 1s
        annotations:
          summary: "Database error rate above 5%"
      - alert: DatabaseSlowQueries
        expr: connection_pool_query_execution_ms{quantile="0.95"} > 1000
        for: 1s
        annotations:
          summary: "95th percentile query time above 1 second"
"""
"""The guide's alerts, but for their patience."""


class Prometheus:
    """A running Prometheus that scrapes one address each second."""

    def __init__(self, directory: Path, target: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.at = f"127.0.0.1:{free.getsockname()[1]}"
        (directory / "alerts.yml").write_text(GUIDE)
        config = directory / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [alerts.yml]\n"
            f"scrape_configs: [{{job_name: raypg, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        self.log = directory / "prometheus.log"
        self._process = subprocess.Popen(
            [
                require_prometheus("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={self.at}",
            ],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    async def get(self, path: str, **query: str) -> Any:
        """What its API says under *path*; ``None`` while it is not there."""
        url = f"http://{self.at}/api/v1/{path}?{urllib.parse.urlencode(query)}"

        def fetch() -> Any:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]

        return await asyncio.to_thread(fetch)

    async def value(self, expression: str) -> float | None:
        """The value of an expression with one result; ``None`` without."""
        found = await self.get("query", query=expression)
        results = found["result"] if found else []
        return float(results[0]["value"][1]) if results else None

    async def firing(self) -> set[str]:
        found = await eventually(lambda: self.get("alerts"), timeout=30)
        return {alert["labels"]["alertname"] for alert in found["alerts"] if alert["state"] == "firing"}


@pytest.fixture
def scraped(ray_cluster: Any) -> Iterator[str]:
    """Where the metrics of all pools are served."""
    server, thread = serve("127.0.0.1", 0)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
async def prometheus(scraped: str, tmp_path: Path) -> AsyncIterator[Prometheus]:
    require_prometheus("prometheus")
    running = Prometheus(tmp_path, scraped)
    try:
        yield running
    finally:
        running.close()


def fetch(at: str) -> str:
    with urllib.request.urlopen(f"http://{at}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


async def test_the_guides_alerts_fire_when_the_server_is_slow_and_when_it_is_down(prometheus: Prometheus) -> None:
    with main_server() as server:
        async with own_pool(server, name="production", max_connections=9) as pool:
            await asyncio.gather(*(pool.fetch("select 1") for _ in range(100)))

            async def scraped() -> bool:
                return await prometheus.value('sum(connection_pool_queries_total{pool="production"})') == 100

            await eventually(scraped, timeout=30)
            rate = 'connection_pool_error_rate{pool="production"}'
            await eventually(lambda: is_value(prometheus, rate, 0), timeout=30)

            async def quiet() -> bool:
                return await prometheus.firing() == set()

            await eventually(quiet, timeout=30)
            p95 = 'connection_pool_query_execution_ms{pool="production",quantile="0.95"}'

            await asyncio.gather(*(pool.fetch("select pg_sleep(1.2)") for _ in range(16)))
            await eventually(lambda: fires(prometheus, "DatabaseSlowQueries"), timeout=30)
            times = (await figures(pool))["detailed_metrics"]["histograms"]["query_execution_ms"]
            assert times["p95"] >= 1190
            await eventually(lambda: is_value(prometheus, p95 + " > 1000", times["p95"]), timeout=30)
            assert "DatabaseErrorRateHigh" not in await prometheus.firing()

            server.stop("immediate")
            failed = 0
            for _ in range(30):
                with contextlib.suppress(UnavailableError):
                    await pool.fetch("select 1")
                    failed -= 1
                failed += 1
            assert failed == 30
            await eventually(lambda: fires(prometheus, "DatabaseErrorRateHigh"), timeout=30)
            await eventually(lambda: is_value(prometheus, rate + " > 0.05", 30 / 146), timeout=30)
            state = 'connection_pool_circuit_breaker_state{pool="production",state="open"}'
            await eventually(lambda: is_value(prometheus, state, 1.0), timeout=30)


async def fires(prometheus: Prometheus, alert: str) -> bool:
    return alert in await prometheus.firing()


async def is_value(prometheus: Prometheus, expression: str, value: float) -> bool:
    found = await prometheus.value(expression)
    return found is not None and found == pytest.approx(value)


async def test_a_scrape_while_the_metrics_actor_is_restarted_serves_what_was_known(
    pool: WorkflowConnectionPool, scraped: str
) -> None:
    await pool.fetch("select 1")
    line = f'connection_pool_info{{pool="{pool.name}"}} 1.0'
    assert line in await asyncio.to_thread(fetch, scraped)
    metrics = cluster.find_metrics()
    assert metrics is not None
    ray.kill(metrics, no_restart=False)
    text = await asyncio.to_thread(fetch, scraped)
    assert line in text
    assert "raypg_metrics_up" in text

    async def is_up() -> bool:
        return "raypg_metrics_up 1.0" in await asyncio.to_thread(fetch, scraped)

    await eventually(is_up, timeout=30)


def test_a_port_in_use_is_said(scraped: str) -> None:
    port = int(scraped.rpartition(":")[2])
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}.*--port"):
        serve("127.0.0.1", port)


async def test_rays_own_metrics_have_them(pool: WorkflowConnectionPool) -> None:
    await pool.fetch("select 1")
    known = (await figures(pool))["detailed_metrics"]["counters"]
    port = ray.nodes()[0]["MetricsExportPort"]
    found: dict[str, float] = {}
    # Other rules fire or not, as the tests before this one have left the pool.
    ids = [
        await add_alert({"name": name, "pool": pool.name, "condition": condition, "duration_seconds": 0})
        for name, condition in (("fires", "max_connections > 0"), ("rests", "max_connections < 0"))
    ]

    async def exported() -> bool:
        text = await asyncio.to_thread(fetch, f"127.0.0.1:{port}")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("pool") == pool.name:
                    key = sample.labels.get("alertname", sample.name)
                    found[key] = max(found.get(key, 0), sample.value)
        return "ray_connection_pool_queries_total" in found and found.get("fires") == 1

    await eventually(exported, timeout=60)
    for id in ids:
        await delete_alert(id)
    assert found["ray_connection_pool_info"] == 1
    assert found["ray_connection_pool_max_connections"] == 10
    assert found["ray_connection_pool_queries_total"] >= 1
    assert found["ray_connection_pool_queries_total"] <= known["queries_total"] + 1
    assert "ray_connection_pool_query_execution_ms" in found
    assert found["rests"] == 0


async def test_postgresql_has_counted_the_same(ray_cluster: Any) -> None:
    """pg_stat_statements knows calls, rows and times of the server's side."""
    with system_server({"shared_preload_libraries": "pg_stat_statements"}) as server:
        direct = await asyncpg.connect(**server.parameters)
        async with own_pool(server, workers=2, max_connections=5, health_check_interval=0.2) as pool:
            await direct.execute("create extension pg_stat_statements; create table t (a int primary key)")
            await direct.execute("select pg_stat_statements_reset()")
            for number in range(40):
                await pool.execute("insert into t values ($1)", number)
            await asyncio.gather(*(pool.fetch("select a from t where a < $1", number) for number in range(300)))
            began = time.monotonic()
            await asyncio.gather(*(pool.fetch("select pg_sleep(0.1)") for _ in range(25)))
            elapsed = time.monotonic() - began
            rows = await direct.fetch(
                "select query, calls, total_exec_time as ms, rows from pg_stat_statements "
                "where query ~ 't where a <|into t|sleep'"
            )

            async def pings() -> int:
                """What asyncpg connections of ours have sent as a ping, as the server has counted it."""
                query = "select coalesce(sum(calls), 0)::int from pg_stat_statements where query = 'SELECT $1'"
                return int(await direct.fetchval(query))

            await eventually(pings, timeout=20)
            earlier = await pings()
            known = await figures(pool, workers=2)
            counts = known["detailed_metrics"]["counters"]
            assert earlier <= counts["health_checks_total"] <= await pings()
            assert counts["health_checks_failed"] <= 1  # a worker that is held up for long has not heard the answer
        await direct.close()
    servers = {row["query"].split()[0].upper() + row["query"].split()[1][:3]: row for row in rows}
    ours = {
        pattern["query"].split()[0].upper() + pattern["query"].split()[1][:3]: pattern
        for pattern in known["pattern_insights"]["detected_patterns"]
    }
    assert servers.keys() == {"INSERTint", "SELECTa", "SELECTpg_"}
    for name, row in servers.items():
        # A read that stalls behind others is asked once more: on a busy machine the server has seen a few more.
        most = ours[name]["count"] * (1 if name == "INSERTint" else 2)
        assert ours[name]["count"] <= row["calls"] <= most
        if row["calls"] == ours[name]["count"]:
            assert ours[name]["total_time_ms"] >= row["ms"] * 0.99  # the way there and back is in ours
    # Four connections have served them, one statement at a time.
    assert 2500 <= ours["SELECTpg_"]["total_time_ms"] <= 4 * elapsed * 1000
    assert (ours["INSERTint"]["count"], ours["SELECTa"]["count"], ours["SELECTpg_"]["count"]) == (40, 300, 25)
    assert known["detailed_metrics"]["counters"]["rows_fetched"] == sum(min(n, 40) for n in range(300)) + 25
