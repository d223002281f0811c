"""What all benchmarks share: a real server, a real cluster, interleaved runs, medians, one report.

Runs of the things that are compared alternate (A B C A B C …), because the speed of a shared machine drifts; what is
reported is the median of each and the median of their ratios within a round.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import ray
import uvloop

from raypg import WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from standby import standby_of

RESULTS = Path(__file__).with_name("results.md")
ROUNDS = int(os.environ.get("RAYPG_BENCH_ROUNDS", "7"))

Contender = Callable[[], Awaitable[float]]


class Setting:
    """A server, a Ray cluster, and a pool of *connections* on it."""

    def __init__(self, server: EmbeddedServer, pool: WorkflowConnectionPool, connections: int) -> None:
        self.server = server
        self.pool = pool
        self.connections = connections

    async def direct_pool(self) -> asyncpg.Pool:
        """An in-process ``asyncpg.Pool`` of as many connections as the pool's workers have."""
        return await asyncpg.create_pool(**self.server.parameters, min_size=self.connections, max_size=self.connections)


@asynccontextmanager
async def setting(connections: int = 8) -> AsyncIterator[Setting]:
    """Start what a benchmark needs, and end it."""
    with EmbeddedServer(settings={"max_connections": "100"}) as server:
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        try:
            pool = WorkflowConnectionPool(
                name="bench",
                max_connections=connections + 1,  # one is kept for control
                **server.parameters,
            )
            await pool.process({"operation": "initialize"})
            yield Setting(server, pool, connections)
            await pool.close()
        finally:
            ray.shutdown()


@asynccontextmanager
async def with_replicas() -> AsyncIterator[
    tuple[WorkflowConnectionPool, EmbeddedServer, EmbeddedServer, EmbeddedServer]
]:
    """A Ray cluster, and a pool with two standbys: (pool, primary, standby, standby). Commits reach the disk, as
    outside of tests."""
    settings = {"max_connections": "100", "fsync": "on"}
    with (
        EmbeddedServer(settings=settings) as primary,
        standby_of(primary, settings) as one,
        standby_of(primary, settings) as other,
    ):
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        try:
            pool = WorkflowConnectionPool(
                name="bench", max_connections=13, replicas=[one.dsn, other.dsn], **primary.parameters
            )
            await pool.process({"operation": "initialize"})
            yield pool, primary, one, other
            await pool.close()
        finally:
            ray.shutdown()


def answer(questions: Mapping[str, Callable[[Setting], Awaitable[None]]]) -> None:
    """Answer the *questions* that the command line names, or all, in one setting."""

    async def main() -> None:
        async with setting() as here:
            for question in sys.argv[1:] or list(questions):
                await questions[question](here)

    uvloop.run(main())


async def rate(work: Callable[[int], Awaitable[Any]], count: int, clients: int) -> float:
    """Calls per second of *count* calls by *clients* coroutines that each wait for their answer."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await work(number)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - started)


async def idle(least: float = 0.9, timeout: float = 10.0) -> None:
    """Wait until the processors were idle for *least* of a fifth of a second, at most *timeout* seconds."""
    gc.collect()
    deadline = time.monotonic() + timeout
    before = _processors()
    while time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        now = _processors()
        if now[0] - before[0] >= least * (now[1] - before[1]):
            return
        before = now


def _processors() -> tuple[int, int]:
    """(ticks without work, all ticks) of all processors so far; see proc(5), ``/proc/stat``."""
    with open("/proc/stat") as file:
        _, *ticks = file.readline().split()
    return int(ticks[3]) + int(ticks[4]), sum(map(int, ticks))


async def compare(contenders: Mapping[str, Contender], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Run all in turn, once to warm up and *rounds* times to count."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            figure = await contender()
            if turn:
                figures[name].append(figure)
    return figures


def ratio(figures: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds of *of* divided by *to*."""
    return statistics.median(a / b for a, b in zip(figures[of], figures[to], strict=True))


def report(title: str, unit: str, figures: Mapping[str, list[float]], lines: list[str]) -> None:
    """Print the figures, and put them into ``results.md`` in place of the last ones of that title."""
    section = [f"## {title}", "", f"| what | median {unit} | min | max |", "|---|---|---|---|"]
    for name, values in figures.items():
        middle = statistics.median(values)
        section.append(f"| {name} | {middle:,.4g} | {min(values):,.4g} | {max(values):,.4g} |")
    rounds = len(next(iter(figures.values())))
    where = f"{os.cpu_count()} cores, Python {platform.python_version()}, Ray {ray.__version__}"
    section += ["", *(f"- {line}" for line in lines), f"- {rounds} interleaved rounds; {where}", ""]
    text = "\n".join(section)
    print(text, flush=True)
    before = RESULTS.read_text() if RESULTS.exists() else "# Benchmark results\n\nWritten by `make bench`.\n\n"
    head, *parts = before.split("\n## ")
    kept = {part.split("\n", 1)[0]: part for part in parts}
    kept[title] = text.removeprefix("## ")
    RESULTS.write_text(head.rstrip("\n") + "\n" + "".join(f"\n## {part.rstrip()}\n" for part in kept.values()))
