"""What the circuit breaker costs: a call that is permitted and succeeds, beside two others; and its part of a read.

The others are asked in their own words and cheapest way: pybreaker by ``breaker.call`` of a function that does
nothing, purgatory by ``async with`` of a breaker that was fetched once, around nothing. raypg's is what a worker does
for each statement: ask for a token, take two times, say how it ended.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import pybreaker
import ray
import uvloop
from measure import compare, rate, ratio, report, setting
from purgatory import AsyncCircuitBreakerFactory

from raypg import naming
from raypg.core.breaker import BreakerConfig, CircuitBreaker

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


async def main() -> None:
    await permission_and_record()
    await part_of_a_read()


if __name__ == "__main__":
    uvloop.run(main())
