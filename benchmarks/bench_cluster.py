"""Many processes and several nodes: workers on three nodes, 24 clients, tasks that flood the database."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import ray
import uvloop
from measure import Setting, compare, rate, ratio, report, setting

import raypg
from raypg.channel import Call
from raypg.messages import FETCH

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from nodes import Nodes
from pgbouncer import PgBouncer

CAP = 20
TASKS = 300
READS = 20
CAREFUL = "PgBouncer, one connection a task"
QUERY = "SELECT balance FROM accounts WHERE id = $1"


class Client:
    """A process with 25 coroutines that read."""

    async def run(self, pool: str, seconds: float) -> tuple[int, Counter[str]]:
        handle = raypg.get_pool(pool)
        until = time.monotonic() + seconds
        done, errors = 0, Counter[str]()

        async def read(first: int) -> None:
            nonlocal done
            number = first
            while time.monotonic() < until:
                number = number * 31 % 10_000 + 1
                try:
                    assert await handle.fetchval(QUERY, number) == number
                    done += 1
                except Exception as error:
                    errors[type(error).__name__] += 1

        await asyncio.gather(*(read(first) for first in range(25)))
        return done, errors


async def clients(here: Setting) -> None:
    pool = raypg.WorkflowConnectionPool(name="clients", **here.server.parameters, max_connections=CAP)
    await pool.process({"operation": "initialize"})
    actors: list[Any] = [ray.remote(Client).options(num_cpus=0).remote() for _ in range(24)]
    await asyncio.gather(*(actor.run.remote("clients", 1.0) for actor in actors))
    rounds = [await asyncio.gather(*(actor.run.remote("clients", 5.0) for actor in actors)) for _ in range(3)]
    reads = [[done / 5.0 for done, _ in round_] for round_ in rounds]
    failed = sum(sum(errors.values()) for round_ in rounds for _, errors in round_)
    figures = {
        "all together": [sum(one) for one in reads],
        "the slowest client": [min(one) for one in reads],
        "the median client": [statistics.median(one) for one in reads],
        "the fastest client": [max(one) for one in reads],
    }
    lines = [
        f"errors: {failed}",
        f"slowest ÷ median client: {ratio(figures, 'the slowest client', 'the median client'):.2f}",
    ]
    report(f"24 client processes of 25 coroutines, cap {CAP}", "reads/s", figures, lines)
    for actor in actors:
        ray.kill(actor)
    await pool.close()


@ray.remote(num_cpus=0.5, max_retries=0)
def direct(parameters: dict[str, Any], first: int) -> Counter[str]:
    """Each read opens a connection, as code does that knows no pool."""

    async def read(number: int) -> str:
        try:
            connection = await asyncpg.connect(**parameters)
        except (asyncpg.PostgresError, OSError) as error:
            return type(error).__name__
        try:
            await connection.fetchval(QUERY, number)
        finally:
            await connection.close()
        return "ok"

    async def main() -> Counter[str]:
        return Counter(await asyncio.gather(*(read((first + n) % 10_000 + 1) for n in range(READS))))

    return asyncio.run(main())


@ray.remote(num_cpus=0.5, max_retries=0)
def in_turn(parameters: dict[str, Any], first: int) -> Counter[str]:
    """One connection for the task, and one read after the other on it: what a careful user writes."""

    async def main() -> Counter[str]:
        connection = await asyncpg.connect(**parameters)
        try:
            for n in range(READS):
                await connection.fetchval(QUERY, (first + n) % 10_000 + 1)
        finally:
            await connection.close()
        return Counter(ok=READS)

    return asyncio.run(main())


@ray.remote(num_cpus=0.5, max_retries=0)
def pooled(pool: str, first: int) -> Counter[str]:
    """The same through raypg."""

    async def main() -> Counter[str]:
        handle = raypg.get_pool(pool)
        reads = (handle.fetchval(QUERY, (first + n) % 10_000 + 1) for n in range(READS))
        results = await asyncio.gather(*reads, return_exceptions=True)
        return Counter("ok" if not isinstance(r, BaseException) else type(r).__name__ for r in results)

    return asyncio.run(main())


async def flood(here: Setting) -> None:
    pool = raypg.WorkflowConnectionPool(name="flood", **here.server.parameters, max_connections=CAP)
    await pool.process({"operation": "initialize"})
    outcomes: dict[str, Counter[str]] = {}

    async def run(name: str, task: Any, where: Any) -> float:
        started = time.monotonic()
        counts = await asyncio.gather(*(task.remote(where, number * READS) for number in range(TASKS)))
        seconds = time.monotonic() - started
        outcomes.setdefault(name, Counter()).update(sum(counts, Counter()))
        return TASKS * READS / seconds

    with PgBouncer(here.server, size=CAP, max_client_conn="2000") as bouncer:
        through = {**bouncer.parameters, "statement_cache_size": 0}
        figures = await compare(
            {
                "direct": lambda: run("direct", direct, here.server.parameters),
                "PgBouncer 1.18, transaction mode": lambda: run("PgBouncer 1.18, transaction mode", direct, through),
                CAREFUL: lambda: run(CAREFUL, in_turn, through),
                "raypg": lambda: run("raypg", pooled, "flood"),
            },
            rounds=5,
        )
    lines = [
        f"raypg ÷ PgBouncer: {ratio(figures, 'raypg', 'PgBouncer 1.18, transaction mode'):.2f} (at least 1)",
        f"raypg ÷ {CAREFUL}: {ratio(figures, 'raypg', CAREFUL):.2f} (at least 1)",
        *(
            f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.most_common())
            for name, counts in outcomes.items()
        ),
        "direct and PgBouncer: a connection for each read unless said otherwise; a server of max_connections=100",
        "8 tasks at a time",
    ]
    report(f"{TASKS} tasks of {READS} point reads, cap {CAP}", "reads/s", figures, lines)
    await pool.close()


async def nodes(here: Setting) -> None:
    more = Nodes()
    try:
        more.add()
        more.add()
        spread = raypg.WorkflowConnectionPool(
            name="spread", **here.server.parameters, max_connections=here.connections + 1, workers=3
        )
        single = raypg.WorkflowConnectionPool(
            name="single", **here.server.parameters, max_connections=here.connections + 1, workers=1
        )
        for pool in (spread, single):
            await pool.process({"operation": "initialize"})

        async def by_spread(number: int) -> None:
            await spread.fetchval(QUERY, number % 10_000 + 1)

        async def by_single(number: int) -> None:
            await single.fetchval(QUERY, number % 10_000 + 1)

        figures = await compare(
            {
                "workers on 3 nodes": lambda: rate(by_spread, 20_000, 1000),
                "one worker": lambda: rate(by_single, 20_000, 1000),
            }
        )
        lines = [f"3 nodes ÷ one: {ratio(figures, 'workers on 3 nodes', 'one worker'):.2f} (at least 0.9)"]
        report("1,000 coroutines over three nodes of one machine, point reads", "reads/s", figures, lines)
        await spread.close()
        await single.close()
    finally:
        more.close()


async def moves(here: Setting) -> None:
    """How long until shares have followed the load; until a silent worker is lost, and until others have its share."""
    pool = raypg.WorkflowConnectionPool(name="moves", **here.server.parameters, max_connections=13, workers=3)
    await pool.process({"operation": "initialize"})
    lines = list((await pool._dispatcher())._channels.values())
    pids = [await line.handle.__ray_call__.remote(lambda self: os.getpid()) for line in lines]

    async def until(condition: Callable[[list[dict[str, Any]]], bool]) -> float:
        started = time.monotonic()
        while not condition((await raypg.cluster.find("moves").status.remote())[1]["workers"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return time.monotonic() - started

    figures: dict[str, list[float]] = {
        "shares have moved": [],
        "a silent worker is lost": [],
        "others have its share": [],
    }
    loop = asyncio.get_running_loop()
    for number in (0, 1, 2, 0, 1):
        calls = [Call(FETCH, "SELECT pg_sleep(0.01)", (), None, None, loop) for _ in range(5_000)]
        for call in calls:
            lines[number].send(call)
        figures["shares have moved"].append(await until(lambda found, n=number: found[n]["budget"] == 10))  # type: ignore[misc]
        await asyncio.gather(*(call.future for call in calls))
    for number in (0, 1, 2):
        os.kill(pids[number], signal.SIGSTOP)
        lost = await until(lambda found, n=number: found[n]["state"] == "lost")  # type: ignore[misc]
        figures["a silent worker is lost"].append(lost)
        rest = await until(lambda found, n=number: sum(w["budget"] for w in found if w["index"] != n) == 12)  # type: ignore[misc]
        figures["others have its share"].append(lost + rest)
        os.kill(pids[number], signal.SIGCONT)
        await until(lambda found: all(worker["state"] == "serving" for worker in found))
    report(
        "Shares of three workers",
        "s",
        figures,
        [
            "limits 5 s, 5 s, 10 s",
            "of workers without load: they hold few of their connections, and what a silent one does not hold is",
            "withheld for authentication_timeout; under load its share has moved after 8 s",
            "each look waits up to 2 s for the silent one",
        ],
    )
    await pool.close()


async def idle(here: Setting) -> None:
    """How much of a core the Pool actor takes when nobody uses the pool."""
    actor = raypg.cluster.find(here.pool.name)

    async def used() -> float:
        return await actor.__ray_call__.remote(lambda self: time.process_time())  # type: ignore[no-any-return]

    shares = []
    for _ in range(3):
        before, started = await used(), time.monotonic()
        await asyncio.sleep(10)
        shares.append((await used() - before) / (time.monotonic() - started) * 100)
    report("The Pool actor of an idle pool", "% of a core", {"Pool actor": shares}, ["limit 5 %"])


async def main() -> None:
    async with setting() as here:
        await here.pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
        await here.pool.execute("INSERT INTO accounts SELECT g, g FROM generate_series(1, 10000) g")
        await idle(here)
        await moves(here)
        await nodes(here)
        await flood(here)
        await clients(here)


if __name__ == "__main__":
    uvloop.run(main())
