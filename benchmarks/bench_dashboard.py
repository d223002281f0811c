"""What the dashboard costs: throughput of reads with and without it, nobody watching; and what viewers cost.

"Without" is the same cluster with the processes of Ray Serve and of the dashboard stopped (SIGSTOP), so that runs can
alternate within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiohttp
import psutil
import ray
from measure import Setting, compare, rate, ratio, report, setting

from raypg import cluster, monitoring, naming

CLIENTS = 500
COUNT = 12_000
QUERY = "SELECT id, balance FROM accounts WHERE id = $1"
VIEWERS = (0, 1, 50)
WATCHED_FOR = 5.0
"""Seconds over which processor time is taken."""


def processes() -> dict[str, psutil.Process]:
    """Serve's and the dashboard's processes, by what they are."""
    words = {"Serve's controller": "ServeController", "Serve's proxy": "ProxyActor", "the dashboard": ":Dashboard"}
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            found |= {name: process for name, word in words.items() if title.startswith("ray::") and word in title}
    return found


async def actors() -> dict[str, psutil.Process]:
    """Those who are asked when somebody watches."""
    handles = {"Metrics": cluster.find_metrics(), "Pool": cluster.find("bench"), "Breaker": cluster.find_breaker()}
    worker = ray.get_actor(naming.worker_actor("bench", 0), namespace=naming.NAMESPACE)
    pids = {
        name: await handle.__ray_call__.remote(_pid) for name, handle in {**handles, "worker": worker}.items() if handle
    }
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def _pid(_: Any) -> int:
    return os.getpid()


@contextlib.contextmanager
def stopped(some: Iterable[psutil.Process]) -> Any:
    """These processes do nothing inside the block."""
    for process in some:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in some:
            process.send_signal(signal.SIGCONT)


def used(process: psutil.Process) -> float:
    """Seconds of processor time so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.asynccontextmanager
async def watching(url: str, viewers: int) -> AsyncIterator[list[int]]:
    """So many viewers; the sizes of the frames that the first one gets."""
    sizes: list[int] = []

    async def view(socket: aiohttp.ClientWebSocketResponse, first: bool) -> None:
        async for message in socket:
            if first:
                sizes.append(len(message.data))  # noqa: PERF401 - one by one, as they come

    async with aiohttp.ClientSession() as http:
        sockets = [await http.ws_connect(f"{url}/ws") for _ in range(viewers)]
        tasks = [asyncio.create_task(view(socket, not number)) for number, socket in enumerate(sockets)]
        yield sizes
        for task in tasks:
            task.cancel()


async def main() -> None:
    async with setting() as here:
        await here.pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int, note text)")
        await here.pool.execute("INSERT INTO accounts SELECT g, g, 'note ' || g FROM generate_series(1, 10000) g")
        answer = await monitoring.start(monitoring.COMMAND, "127.0.0.1", 0)
        await nobody_watches(here)
        await somebody_watches(here, answer["dashboard_url"])
        await monitoring.stop_all()


async def nobody_watches(here: Setting) -> None:
    found = processes()

    async def read(number: int) -> None:
        await here.pool.fetchrow(QUERY, number % 10_000 + 1)

    async def reads(without: list[str]) -> float:
        with stopped([found[name] for name in without if name in found]):
            return await rate(read, COUNT, CLIENTS)

    speeds = await compare(
        {
            "without": lambda: reads(list(found)),
            "Serve alone": lambda: reads(["the dashboard"]),
            "Serve and the dashboard": lambda: reads([]),
        },
        rounds=15,
    )
    before = {name: used(process) for name, process in found.items()}
    await asyncio.sleep(WATCHED_FOR)
    idle = {name: (used(process) - before[name]) / WATCHED_FOR for name, process in found.items()}
    report(
        "The dashboard when nobody watches: throughput of 500 coroutines that read",
        "reads/s",
        speeds,
        [
            f"the dashboard ÷ Serve alone: {ratio(speeds, 'Serve and the dashboard', 'Serve alone'):.3f} (limit 0.99)",
            f"Serve and the dashboard ÷ without: {ratio(speeds, 'Serve and the dashboard', 'without'):.3f}",
            "where rounds differ by more than 1 %, as on a machine that does other things too, only the next line can "
            "show as little",
            "shares of one core when nothing runs: "
            + ", ".join(f"{name} {share * 100:.1f} %" for name, share in sorted(idle.items())),
        ],
    )


async def somebody_watches(here: Setting, url: str) -> None:
    """Under a steady load that leaves the machine room."""
    watched = {**processes(), **await actors()}
    shares: dict[str, list[float]] = {}
    sizes: list[int] = []

    async def load() -> None:
        number = 0
        while True:
            number += 1
            await asyncio.gather(*(here.pool.fetchrow(QUERY, (number * 7 + i) % 10_000 + 1) for i in range(20)))
            await asyncio.sleep(0.05)

    loading = asyncio.create_task(load())
    for _ in range(3):
        for viewers in VIEWERS:
            async with watching(url, viewers) as seen:
                await asyncio.sleep(1.0)
                before, began = {name: used(process) for name, process in watched.items()}, time.monotonic()
                await asyncio.sleep(WATCHED_FOR)
                seconds = time.monotonic() - began
                for name, process in watched.items():
                    share = (used(process) - before[name]) / seconds * 100
                    shares.setdefault(f"{name}, {viewers} viewers", []).append(share)
                sizes += seen[1:]
    loading.cancel()
    order = sorted(shares, key=lambda name: (name.split(",")[0], int(name.split()[-2])))
    fifty = statistics.median(shares["the dashboard, 50 viewers"])
    report(
        "Viewers of the dashboard: processor time under a load of 400 reads/s",
        "% of a core",
        {name: shares[name] for name in order},
        [
            f"the dashboard with 50 viewers: {fifty:.1f} % of a core (limit 15)",
            f"a frame has {statistics.median(sizes):,.0f} characters, {max(sizes):,} at most",
        ],
    )


if __name__ == "__main__":
    asyncio.run(main())
