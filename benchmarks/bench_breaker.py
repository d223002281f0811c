"""What the circuit breaker costs: a call that is permitted and succeeds, beside two others; and its part of a read.

The others are asked in their own words and cheapest way: pybreaker by ``breaker.call`` of a function that does
nothing, purgatory by ``async with`` of a breaker that was fetched once, around nothing. raypg's is what a worker does
for each statement: ask for a token, take two times, say how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from typing import Any

import pybreaker
import ray
import uvloop
from measure import compare, rate, ratio, report, setting
from purgatory import AsyncCircuitBreakerFactory

from raypg import UnavailableError, WorkflowConnectionPool, naming
from raypg.core.breaker import CLOSED, OPEN, BreakerConfig, CircuitBreaker
from raypg.embedded import EmbeddedServer

CALLS = 20_000
LIMIT_US = 1.0
LIMIT_SHARE = 0.03


def nothing() -> None:
    """What the others call."""


async def permission_and_record() -> None:
    machine = CircuitBreaker(BreakerConfig(), time.monotonic(), random.random)
    other = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60)
    third = await AsyncCircuitBreakerFactory(default_threshold=5, default_ttl=60).get_breaker("bench")

    def microseconds(started: float) -> float:
        return (time.perf_counter() - started) / CALLS * 1e6

    async def by_raypg() -> float:
        now = time.monotonic
        started = time.perf_counter()
        for _ in range(CALLS):
            begun = now()
            token = machine.permit(begun)
            ended = now()
            machine.succeeded(token, ended - begun, ended)
        return microseconds(started)

    async def by_pybreaker() -> float:
        started = time.perf_counter()
        for _ in range(CALLS):
            other.call(nothing)
        return microseconds(started)

    async def by_purgatory() -> float:
        started = time.perf_counter()
        for _ in range(CALLS):
            async with third:
                pass
        return microseconds(started)

    figures = await compare({"raypg": by_raypg, "pybreaker": by_pybreaker, "purgatory": by_purgatory}, rounds=15)
    middle = statistics.median(figures["raypg"])
    report(
        "Circuit breaker: permission and record of one call",
        "µs",
        figures,
        [
            f"raypg {middle:.2f} µs (limit {LIMIT_US:g} µs)",
            *(f"{name} ÷ raypg: {ratio(figures, name, 'raypg'):.1f}" for name in ("pybreaker", "purgatory")),
        ],
    )


def without_guard(worker: Any) -> None:
    """In a worker: statements are told to nobody."""
    guard = worker._engine.guard
    guard.succeeded = lambda *_: None
    for connection in worker._engine.connections:
        connection.guard = None


def with_guard(worker: Any) -> None:
    guard = worker._engine.guard
    guard.__dict__.pop("succeeded", None)
    for connection in worker._engine.connections:
        connection.guard = guard


async def part_of_a_read() -> None:
    async with setting() as here:
        worker = ray.get_actor(naming.worker_actor("bench", 0), namespace=naming.NAMESPACE)

        async def read(number: int) -> None:
            await here.pool.fetchrow("SELECT $1::int AS n", number)

        async def reads(switch: Any) -> float:
            await worker.__ray_call__.remote(switch)
            return await rate(read, 20_000, 1000)

        figures = await compare({"with": lambda: reads(with_guard), "without": lambda: reads(without_guard)}, rounds=15)
        cost = 1 - ratio(figures, "with", "without")
        report(
            "Circuit breaker and health: reads with and without",
            "reads/s",
            figures,
            [f"they cost {cost:.1%} of the reads (limit {LIMIT_SHARE:.0%})"],
        )


async def changes_to(pool: WorkflowConnectionPool, state: str) -> asyncio.Future[float]:
    """When the breaker is in *state* next."""
    when: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def changed(_: str, new: str, __: object) -> None:
        if new == state and not when.done():
            when.set_result(time.monotonic())

    await pool.circuit_breaker.add_listener(changed)
    return when


async def kill_and_start(server: EmbeddedServer, pool: WorkflowConnectionPool) -> tuple[list[float], float]:
    """Kill and start *server* under load.

    Returns:
        (how long after the opening each call ended, sorted; from the server's return to closed), in seconds.
    """
    calls: list[tuple[float, float]] = []
    over = asyncio.Event()

    async def call() -> None:
        while not over.is_set():
            begun = time.monotonic()
            with contextlib.suppress(UnavailableError):
                await pool.fetchval("SELECT 1")
            calls.append((begun, time.monotonic()))
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(call()) for _ in range(600)]
    await asyncio.sleep(1.0)
    opening = await changes_to(pool, OPEN)
    await asyncio.to_thread(server.kill)
    opened = await opening
    await asyncio.sleep(1.0)
    over.set()
    await asyncio.gather(*tasks)
    closing = await changes_to(pool, CLOSED)
    await asyncio.to_thread(server.start)
    started = time.monotonic()
    closed = await closing
    pool.circuit_breaker.stop_listening()
    return sorted(end - max(begun, opened) for begun, end in calls if end > opened), max(0.0, closed - started)


async def outage() -> None:
    """The server is killed under three workers with 200 coroutines each, and comes back."""
    figures: dict[str, list[float]] = {"p99 of a call, from the opening": [], "closed, from the server's return": []}
    async with setting() as here:
        recovery = 2.0
        pool = WorkflowConnectionPool(
            name="outage",
            max_connections=10,
            workers=3,
            circuit_breaker_recovery_timeout=recovery,
            **here.server.parameters,
        )
        await pool.process({"operation": "initialize"})
        for _ in range(5):
            waits, back = await kill_and_start(here.server, pool)
            figures["p99 of a call, from the opening"].append(waits[len(waits) * 99 // 100] * 1000)
            figures["closed, from the server's return"].append(back * 1000)
        await pool.close()
    report(
        "Circuit breaker: the server killed under 3 workers × 200 coroutines",
        "ms",
        figures,
        [f"limits: 250 ms, and recovery_timeout ({recovery:g} s) + 1 s"],
    )


async def main() -> None:
    await permission_and_record()
    await part_of_a_read()
    await outage()


if __name__ == "__main__":
    uvloop.run(main())
