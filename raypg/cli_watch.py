"""``raypg status --watch``: how all pools stand, again and again."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import ray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raypg.cli_pools import connect
from raypg.core.pool_metrics import utilization
from raypg.errors import RaypgError
from raypg.metrics_access import snapshots
from raypg.naming import check_pool_name

__all__ = ["screen", "watch"]

EVERY = 1.0
"""Seconds between two looks."""

SHOWN = 10
"""Statements on the screen."""

Known = dict[str, dict[str, Any]]

_PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0), "title_justify": "left"}


def watch(name: str | None, address: str) -> None:
    """Show all pools, or one, until interrupted."""
    if name is not None:
        check_pool_name(name)
    connect(address)
    try:
        asyncio.run(_watch(None if name is None else [name]))
    except KeyboardInterrupt:
        pass


async def _watch(names: list[str] | None) -> None:
    before: Known = {}
    with Live(Text("…"), console=Console(), screen=False, auto_refresh=False) as live:
        while True:
            started = time.monotonic()
            try:
                known = await snapshots(names)
            except (RaypgError, ray.exceptions.RayError) as error:
                live.update(Text(str(error).splitlines()[0], style="red"), refresh=True)
            else:
                live.update(screen(known, before), refresh=True)
                before = known
            await asyncio.sleep(max(0.0, EVERY - (time.monotonic() - started)))


def screen(known: Known, before: Known) -> RenderableType:
    """What is shown: the pools, and the statements that took most time since the look *before*."""
    if not known:
        return Text("no pool runs in this Ray cluster; start one with `raypg up`")
    return Group(_pools(known), Text(), _statements(known, before))


def _pools(known: Known) -> Table:
    table = Table(**_PLAIN)
    table.add_column("pool")
    for heading in ("in use", "open", "at most", "waiting", "per second", "failed", "p95 ms", "p95 wait ms"):
        table.add_column(heading, justify="right")
    table.add_column("breaker")
    table.add_column("workers")
    table.add_column("alerts")
    for name, pool in known.items():
        gauges, window, recent = pool["gauges"], pool["window"], pool["recent"]
        state = pool["circuit_breaker"]["state"] or "?"
        workers = [worker["up"] for worker in pool["workers"].values()]
        table.add_row(
            f"[bold]{escape(name)}[/]",
            _warn(f"{gauges['active']:.0f}", utilization(gauges) > 0.9),
            f"{gauges['total']:.0f}",
            f"{gauges['max_connections']:.0f}",
            _warn(f"{gauges['waiting']:.0f}", gauges["waiting"] > 0),
            f"{window['queries_per_second']:,.0f}",
            _warn(f"{window['error_rate']:.1%}", window["error_rate"] > 0.05),
            _ms(recent["execution"]["p95"]),
            _ms(recent["wait"]["p95"]),
            _warn(state.replace("_", " "), state != "closed"),
            _warn(f"{sum(workers)} of {len(workers)}", not all(workers)),
            _warn(", ".join(alert for alert, _, fires in pool["alerts"] if fires), True),
        )
    return table


def _statements(known: Known, before: Known) -> Table:
    table = Table(title="statements that take most time now", **_PLAIN)
    table.add_column("pool")
    for heading in ("per second", "busy", "mean ms", "p95 ms", "errors"):
        table.add_column(heading, justify="right")
    table.add_column("statement", overflow="ellipsis", no_wrap=True)
    rows = []
    for name, pool in known.items():
        earlier = before.get(name)
        seen = {statement["fingerprint"]: statement for statement in earlier["statements"]} if earlier else {}
        seconds = pool["as_of"] - (earlier["as_of"] if earlier else pool["since"])
        for statement in pool["statements"]:
            old = seen.get(statement["fingerprint"], {"seconds": 0.0, "count": 0, "errors": 0})
            took, count = statement["seconds"] - old["seconds"], statement["count"] - old["count"]
            if count > 0:
                rows.append((took, count, max(seconds, 1e-3), name, statement, statement["errors"] - old["errors"]))
    for took, count, seconds, name, statement, errors in sorted(rows, key=lambda row: -row[0])[:SHOWN]:
        table.add_row(
            escape(name),
            f"{count / seconds:,.0f}",
            f"{took / seconds:.2f}",
            _ms(took / count),
            _ms(statement["p95"]),
            _warn(f"{errors:,}", errors > 0),
            escape(statement["text"] or statement["command"]),
        )
    return table


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1000:,.2f}"


def _warn(text: str, wrong: bool) -> str:
    return f"[red]{escape(text)}[/]" if wrong else escape(text)
