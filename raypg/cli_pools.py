"""``raypg up``, ``status`` and ``down``: what they do in a Ray cluster, and how it is shown."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raypg import WorkflowConnectionPool, cluster, messages
from raypg.alerts_access import alerts
from raypg.config import PoolConfig
from raypg.core.alerts import FIRING
from raypg.core.nearest import did_you_mean
from raypg.errors import ConfigError, PoolNotFoundError, RaypgError, UnavailableError
from raypg.naming import check_pool_name
from raypg.plain import without_nan
from raypg.pool import get_pool
from raypg.pool_life import end
from raypg.pool_life import restart as restart_pool
from raypg.portable import unpack_error
from raypg.replica_status import replicas_of

DEFAULT_POOL = "main_pool"
DEFAULT_FILE = Path("raypg.toml")
ANSWER_WITHIN = 10.0
"""Seconds in which a Pool actor must say how things stand."""


def up(name: str | None, file: Path | None, address: str, dashboard: bool) -> None:
    """Start the pools that file and environment describe, and say of each what came of it.

    Args:
        dashboard: start that too, not only for pools that ask for it by ``enable_monitoring``.
    """
    # Settings first: what is wrong in a file is said even where no cluster is.
    pools = [WorkflowConnectionPool(**settings) for settings in wanted(name, file)]
    connect(address)
    console = Console()
    failures = []
    for pool in pools:
        try:
            answer = asyncio.run(pool.process({"operation": "initialize"}))
        except RaypgError as error:
            failures.append(f"{pool.name}: {'; '.join(str(error).splitlines())}")
            continue
        word = "started" if answer["status"] == "initialized" else "runs already"
        console.print(f"{pool.name}: {word}, at most {answer['max_connections']} connections", highlight=False)
    asking = [pool for pool in pools if dashboard or (pool._config is not None and pool._config.enable_monitoring)]
    if asking:
        quiet_serve()
        try:
            urls = [asyncio.run(pool.process({"operation": "start_monitoring"}))["dashboard_url"] for pool in asking]
            console.print("\n".join(f"dashboard: {url}" for url in dict.fromkeys(urls)), highlight=False)
        except RaypgError as error:
            failures.append(f"dashboard: {error}")
    if failures:
        raise UnavailableError("\n".join(failures))


def wanted(name: str | None, file: Path | None) -> list[dict[str, Any]]:
    """The constructor's arguments for each pool to start.

    Args:
        name: only this one.
        file: the file to read; None = raypg.toml here if it exists, else the environment alone.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or does not have the pool.
    """
    if file is None and not DEFAULT_FILE.exists():
        tables: dict[str, Any] = {name or DEFAULT_POOL: {}}
    else:
        tables = _tables(file or DEFAULT_FILE)
        if name is not None:
            if name not in tables:
                raise ConfigError(
                    f"{file or DEFAULT_FILE} has no table [pools.{name}]{did_you_mean(name, tables)}; "
                    f"it has {', '.join(tables)}"
                )
            tables = {name: tables[name]}
    return [_arguments(pool, table) for pool, table in tables.items()]


def _tables(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: it is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from None
    tables = content.get("pools")
    if strange := [key for key in content if key != "pools"]:
        raise ConfigError(f"{file}: {strange[0]!r} is unknown at the top; pools are tables [pools.NAME]")
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{file}: it holds no pool; write a table [pools.NAME] with the settings of each")
    return tables


def _arguments(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    if table.get("name", name) != name:
        raise ConfigError(f"[pools.{name}]: name = {table['name']!r} contradicts the name of the table; leave it out")
    return {**table, "name": name}


def down(name: str, address: str) -> None:
    """End pool *name*."""
    check_pool_name(name)
    connect(address)
    asyncio.run(end(name, f"pool {name!r} was ended by `raypg down`"))
    Console().print(f"{name}: ended", highlight=False)


def restart(name: str, address: str) -> None:
    """Replace the processes of pool *name*."""
    check_pool_name(name)
    connect(address)
    workers = asyncio.run(restart_pool(name))
    Console().print(f"{name}: {workers} workers replaced, and the pool's own actor", highlight=False)


def scale(name: str, workers: str | None, max_connections: int | None, address: str) -> None:
    """Give pool *name* another size."""
    check_pool_name(name)
    wanted: int | str | None = int(workers) if workers is not None and workers.isdigit() else workers
    connect(address)
    done = asyncio.run(get_pool(name).scale(workers=wanted, max_connections=max_connections))
    ending = f", {len(done['draining'])} more end when they are not used any more" if done["draining"] else ""
    Console().print(
        f"{name}: at most {done['new_size']} connections, {done['workers']} workers{ending}", highlight=False
    )


def status(name: str | None, address: str, as_json: bool) -> None:
    """Show all pools, or one."""
    if name is not None:
        check_pool_name(name)
    connect(address)
    names = cluster.running_pools()
    if name is not None:
        if name not in names:
            raise PoolNotFoundError(name, names)
        names = [name]
    found = asyncio.run(_all_figures(names))
    if as_json:
        print(json.dumps(without_nan(found), indent=2))
        return
    console = Console()
    if not found:
        console.print("no pool runs in this Ray cluster; start one with `raypg up`", highlight=False)
    for pool in found:
        _show(console, pool)


async def _all_figures(names: list[str]) -> list[dict[str, Any]]:
    if not names:
        return []
    active, *found = await asyncio.gather(_active_alerts(), *map(_figures, names))
    return [{**pool, "alerts": None if active is None else active.get(pool["pool_name"], [])} for pool in found]


async def _active_alerts() -> dict[str, list[dict[str, Any]]] | None:
    """The alerts of each pool, pending ones included; ``None`` if that cannot be known."""
    by_pool: dict[str, list[dict[str, Any]]] = {}
    try:
        for alert in (await alerts(history=0, names=False, within=ANSWER_WITHIN))["active"]:
            by_pool.setdefault(alert["pool"], []).append(alert)
    except (RaypgError, ray.exceptions.RayError):
        return None  # the Metrics actor is just being started or restarted
    return by_pool


async def _figures(name: str) -> dict[str, Any]:
    """What the Pool actor says; or ``{"pool_name", "problem"}``."""
    try:
        actor = cluster.find(name)
        kind, value = await asyncio.wait_for(actor.status.remote(), ANSWER_WITHIN)
        if kind == "error":
            raise unpack_error(value)
        kind, greeting = await asyncio.wait_for(actor.hello.remote(messages.hello(), None), ANSWER_WITHIN)
        if kind != "ok":
            raise unpack_error(greeting)
    except TimeoutError:
        return {"pool_name": name, "problem": f"its Pool actor did not answer within {ANSWER_WITHIN:g} s"}
    except (RaypgError, ray.exceptions.RayError) as error:
        return {"pool_name": name, "problem": str(error).splitlines()[0]}
    try:
        breaker = await get_pool(name).circuit_breaker.status()
    except RaypgError:
        breaker = None  # it is just being restarted
    database = str(PoolConfig.from_dict(greeting["config"]).target)
    return {**value, "database": database, "circuit_breaker": breaker, "problem": None}


def _show(console: Console, pool: dict[str, Any]) -> None:
    if pool["problem"] is not None:
        console.print(f"[bold]{escape(pool['pool_name'])}[/]  [red]{escape(pool['problem'])}[/]", highlight=False)
        _show_alerts(console, pool["alerts"])
        return
    all_figures = [worker["figures"] for worker in pool["workers"] if worker["figures"]]
    total = sum(figures["total"] for figures in all_figures)
    console.print(
        f"[bold]{escape(pool['pool_name'])}[/]  {escape(pool['database'])}  "
        f"{total} of {pool['max_connections']} connections{_lowered(pool)}, "
        f"{sum(figures['waiting'] for figures in all_figures)} waiting",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("worker", "node", "state"):
        table.add_column(heading)
    for heading in ("connections", "busy", "waiting", "statements", "errors", "mean ms"):
        table.add_column(heading, justify="right")
    for worker in pool["workers"]:
        figures = worker["figures"]
        place = (str(worker["index"]), worker["node"][:12])
        if figures is None:
            table.add_row(*place, worker["state"], f"[red]silent for {worker['silent']:.0f} s[/]")
            continue
        table.add_row(
            *place,
            worker["state"],
            f"{figures['total']} of {worker['budget']}",
            str(figures["active"]),
            str(figures["waiting"]),
            f"{figures['executed']:,}",
            f"{figures['errors']:,}",
            f"{figures['query_ms']['mean']:.2f}" if figures["query_ms"]["count"] else "-",
        )
    console.print(table)
    _show_alerts(console, pool["alerts"])
    _show_replicas(console, replicas_of(all_figures))
    _show_breaker(console, pool["circuit_breaker"])
    for figures in all_figures:
        if figures["last_error"]:
            console.print(f"  [red]last error:[/] {escape(figures['last_error'])}", highlight=False, soft_wrap=True)
    _show_leases(console, all_figures)
    _show_reclaimed(console, all_figures)


def _lowered(pool: dict[str, Any]) -> str:
    wanted = pool["configured_max_connections"]
    return f" (the server has no room for {wanted})" if wanted > pool["max_connections"] else ""


def _show_reclaimed(console: Console, all_figures: list[dict[str, Any]]) -> None:
    """How many leases were taken back because nobody gave them back; nothing if none."""
    words = {"process died": "of dead processes", "forgotten": "forgotten", "deadline": "held for too long"}
    counts = {why: sum(figures["reclaimed_leases"][why] for figures in all_figures) for why in words}
    if any(counts.values()):
        told = ", ".join(f"{count} {words[why]}" for why, count in counts.items() if count)
        console.print(f"  leases taken back: {told}", highlight=False)


def _show_alerts(console: Console, active: list[dict[str, Any]] | None) -> None:
    """What fires; nothing if nothing does."""
    if active is None:
        console.print("  [yellow]alerts:[/] the Metrics actor does not answer", highlight=False)
    for alert in active or ():
        if alert["state"] == FIRING:
            seconds = time.time() - alert["fired_at"]
            text = f"{alert['name']} ({alert['severity']}, for {seconds:.0f} s): {alert['message']}"
            console.print(f"  [red]alert:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _show_breaker(console: Console, breaker: dict[str, Any] | None) -> None:
    """What is wrong with the circuit breaker; nothing if nothing is."""
    if breaker is None:
        console.print("  [yellow]circuit breaker:[/] its actor does not answer", highlight=False)
        return
    left = breaker["time_until_recovery"]
    if breaker["state"] != "closed":
        until = f"; probes in {left:.0f} s" if left else "; until it is lifted" if breaker["forced"] else ""
        text = f"{breaker['state'].replace('_', ' ')}{until}: {breaker['reason']}"
        console.print(f"  [red]circuit breaker:[/] {escape(text)}", highlight=False, soft_wrap=True)
    isolated = [str(worker) for worker, state in breaker["workers"].items() if state["isolated"]]
    if isolated:
        console.print(f"  [red]cut off from the database:[/] worker {', '.join(isolated)}", highlight=False)


def _show_replicas(console: Console, replicas: list[dict[str, Any]]) -> None:
    """Role, lag and health of each replica; nothing without replicas."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("replica", "role", "breaker"):
        table.add_column(heading)
    for heading in ("used by", "behind", "bytes", "connections", "busy", "waiting"):
        table.add_column(heading, justify="right")
    table.add_column("problem", overflow="fold")
    for replica in replicas:
        seconds, behind = replica["lag_seconds"], replica["lag_bytes"]
        table.add_row(
            escape(replica["replica"]),
            replica["role"],
            replica["circuit_breaker"].replace("_", " "),
            f"{replica['used_by']} of {replica['workers']}",
            "-" if math.isnan(seconds) else f"{seconds:.1f} s",
            "-" if behind is None else f"{behind:,}",
            f"{replica['total']} of {replica['budget']}",
            str(replica["active"]),
            str(replica["waiting"]),
            f"[red]{escape(replica['problem'])}[/]" if replica["problem"] else "",
        )
    if table.row_count:
        console.print(table)


def _show_leases(console: Console, all_figures: list[dict[str, Any]]) -> None:
    table = Table(title="leases", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("connection", "backend", "held by", "job", "node", "process"):
        table.add_column(heading)
    table.add_column("for", justify="right")
    for figures in all_figures:
        for identifier, connection in figures["connections"].items():
            owner = connection["lease"]
            if owner is None:
                continue
            table.add_row(
                identifier,
                str(connection["backend_pid"]),
                escape(owner["held_by"]),
                owner["job"],
                owner["node"][:12],
                str(owner["process"]),
                f"{owner['age']:.0f} s",
            )
    if table.row_count:
        console.print(table)


def connect(address: str) -> None:
    """Connect to a Ray cluster that runs.

    Raises:
        UnavailableError: there is none.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            # Ray itself would try for half a minute.
            socket.create_connection((host, int(port)), timeout=5.0).close()
        except OSError as error:
            raise UnavailableError(
                f"no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start --head`"
            ) from None
    # Seconds for which Ray tries to reach a head that answers and will not let us in, or is no Ray at all.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "4")
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UnavailableError(_why_not(address, error)) from None


def quiet_serve() -> None:
    """Serve tells each step on standard error: here only what goes wrong. (It sets its level when it is imported.)"""
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)


def _why_not(address: str, error: Exception) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    text = " ".join(str(error).split())
    if any("AuthenticationError" in str(cause) or "InvalidAuthToken" in str(cause) for cause in causes):
        return (
            f"the Ray cluster ({address}) asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the "
            "file that holds it if that is not ~/.ray/auth_token"
        )
    if "Could not find any running Ray instance" in text:
        return "no Ray cluster runs on this machine; start one with `ray start --head`, or name one with --address"
    return f"cannot use the Ray cluster ({address}): {text}"
