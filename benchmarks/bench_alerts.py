"""What watching alerts costs the Metrics actor: ten pools of 200 fingerprints, ten rules for each, once a second."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import uvloop
from bench_metrics import processor_time, tell
from measure import compare, report, setting

from raypg import cluster
from raypg.alerts_access import add_alert, alerts, delete_alert

POOLS = 10
OVER = 4.0
"""Seconds that each figure is taken over."""

CONDITIONS = (
    "avg_query_time_ms > 100000",
    "query_execution_ms_p95 > 100000 or query_execution_ms_p99 > 200000",
    "connection_acquisition_ms_p99 > 100000",
    "error_rate > 1 and calls_last_minute >= 10",
    "active_connections > 0.9 * (max_connections + 1000) and queue_depth > 0",
    "queries_per_second / max_connections > 1000000",
    "pool_exhaustion_events_last_minute > 1000000",
    "circuit_breaker_open == 1",
    "workers_up > 1000 or workers_down > 1000",
    "not (seconds_since_report < 100000)",
)
"""None of them holds."""


async def main() -> None:
    async with setting():
        metrics: Any = cluster.find_metrics()
        await tell(POOLS - 1, 200)
        for rule in (await alerts())["rules"]:
            await delete_alert(rule["id"])

        async def used() -> float:
            before, started = await metrics.__ray_call__.remote(processor_time), time.perf_counter()
            await asyncio.sleep(OVER)
            spent = await metrics.__ray_call__.remote(processor_time) - before
            return float(spent / (time.perf_counter() - started) * 1000)

        async def watched() -> float:
            ids = [await add_alert({"name": condition[:50], "condition": condition}) for condition in CONDITIONS]
            figure = await used()
            for id in ids:
                await delete_alert(id)
            return figure

        figures = await compare({"ten rules for each pool": watched, "no rules": used}, rounds=4)
        differences = [a - b for a, b in zip(figures["ten rules for each pool"], figures["no rules"], strict=True)]
        report(
            "What alerts cost the Metrics actor, ten pools",
            "ms of processor time a second",
            figures,
            [f"the rules: {sorted(differences)[len(differences) // 2]:.1f} ms a second"],
        )
        for number in range(POOLS - 1):
            await metrics.forget.remote(f"told-{number}")


if __name__ == "__main__":
    uvloop.run(main())
