"""What metrics cost: recording, the throughput of reads with and without, a status call, a scrape of ten pools."""

from __future__ import annotations

import asyncio
import statistics
import time
import timeit
import urllib.request
from types import SimpleNamespace
from typing import Any

import ray
import uvloop
from measure import Setting, compare, rate, ratio, report, setting

from raypg import cluster, naming
from raypg.core.pool_metrics import GAUGES
from raypg.core.sketch import Sketch
from raypg.metrics_server import serve
from raypg.server.figures import Figures

CLIENTS = 1_000
QUERY = "SELECT id, balance FROM accounts WHERE id = $1"
OTHER = "SELECT note FROM accounts WHERE id = $1"


def recording(texts: list[str], number: int = 20_000) -> float:
    """Microseconds to record one statement, its wait included, the texts one after the other."""
    figures: Any = Figures()
    connection: Any = SimpleNamespace(used=1, uses=0, taken_at=0.0)
    position = 0

    def record() -> None:
        nonlocal position
        position = (position + 1) % len(texts)
        figures.waited(0.00002, connection)
        figures.ran(0.0004, False, texts[position])

    record()
    return timeit.timeit(record, number=number) / number * 1e6


def switch(worker: Any, on: bool) -> None:
    """Runs in a worker: count and time, or do nothing of the kind."""
    from raypg.server.figures import Figures
    from raypg.server.outcomes import outcome_of

    if not hasattr(worker, "recording"):
        names = ("ran", "ran_together", "waited", "waited_together", "given_back", "fetched")
        worker.recording = {name: getattr(Figures, name) for name in names}

    def nothing(*_: Any) -> None:
        pass

    without = {**dict.fromkeys(worker.recording, nothing), "fetched": lambda _, *answer: outcome_of(*answer)}
    for name, function in (worker.recording if on else without).items():
        setattr(Figures, name, function)
    line = worker._metrics

    def talk() -> None:
        line.close()
        if on:
            line._task, line._closed = None, False
            line.open()

    worker._engine._loop.call_soon_threadsafe(talk)  # this runs in a thread


def processor_time(_: Any) -> float:
    """Runs in a worker: seconds of processor time that it has used."""
    return time.process_time()


class Teller:
    """Stands for the workers of pools that only exist in the Metrics actor."""

    async def metrics(self, incarnation: str, known: int) -> list[Any]:
        return []


async def tell(pools: int, fingerprints: int) -> None:
    """Tell the Metrics actor of so many pools with so many fingerprints each."""
    metrics: Any = cluster.find_metrics()
    teller = ray.remote(Teller).options(num_cpus=0).remote()
    sketch = Sketch()
    for number in range(1, 200):
        sketch.add(number / 1000)
    groups = [
        (
            f"{number:016x}",
            ("SELECT", "INSERT", "UPDATE")[number % 3],
            f"text {number}",
            sketch.buckets,
            sketch.total,
            0,
        )
        for number in range(fingerprints)
    ]
    delta = {
        "seq": 1,
        "age": 0.0,
        "seconds": 1.0,
        "counts": {"queries": 199 * fingerprints},
        "times": {"wait": (sketch.buckets, sketch.total)},
        "groups": groups,
        "floor": 0.0,
        "errors": {("query_error", "22012"): 3},
        "recent": [],
        "gauges": dict.fromkeys(GAUGES, 3.0),
    }
    for number in range(pools):
        where = (f"told-{number}", 0, "life")
        await metrics.join.remote(*where, [teller], 60)
        await metrics.report.remote(*where, [delta])


async def main() -> None:
    async with setting() as here:
        await cost_of_recording(here)
        await looking(here)


async def cost_of_recording(here: Setting) -> None:
    mixed = [QUERY, OTHER, "INSERT INTO t VALUES ($1)", "UPDATE t SET a = $1"]
    figures = {
        "a few statements": [recording(mixed) for _ in range(7)],
        "500 texts of one statement": [recording([f"SELECT {n}" for n in range(500)]) for _ in range(7)],
    }
    report("Recording one statement", "µs", figures, ["limit 4"])

    await here.pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int, note text)")
    await here.pool.execute("INSERT INTO accounts SELECT g, g, 'note ' || g FROM generate_series(1, 10000) g")
    worker = ray.get_actor(naming.worker_actor("bench", 0), namespace=naming.NAMESPACE)
    pool, count = here.pool, 20_000
    used: dict[str, list[float]] = {"with metrics": [], "without": []}

    async def read(number: int) -> None:
        await pool.fetchrow(OTHER if number % 4 == 0 else QUERY, number % 10_000 + 1)

    async def reads(on: bool) -> float:
        await worker.__ray_call__.remote(switch, on)
        before = await worker.__ray_call__.remote(processor_time)
        speed = await rate(read, count, CLIENTS)
        seconds = await worker.__ray_call__.remote(processor_time) - before
        used["with metrics" if on else "without"].append(seconds / count * 1e6)
        return speed

    speeds = await compare({"with metrics": lambda: reads(True), "without": lambda: reads(False)}, rounds=15)
    await worker.__ray_call__.remote(switch, True)
    used = {name: values[1:] for name, values in used.items()}
    report(
        "What metrics cost 1,000 coroutines that read: processor time of the worker",
        "µs for one read",
        used,
        [f"with ÷ without: {ratio(used, 'with metrics', 'without'):.3f} (limit 1.04)"],
    )
    report(
        "What metrics cost 1,000 coroutines that read: throughput",
        "reads/s",
        speeds,
        [f"with ÷ without: {ratio(speeds, 'with metrics', 'without'):.3f} (limit 0.96)"],
    )


async def looking(here: Setting) -> None:
    async def timed(work: Any, count: int = 50) -> float:
        took = []
        for _ in range(count):
            started = time.perf_counter()
            await work()
            took.append((time.perf_counter() - started) * 1000)
        return statistics.median(took)

    server, thread = serve("127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.server_port}/metrics"

    async def status() -> None:
        await here.pool.process({"operation": "get_comprehensive_status"})

    async def scrape() -> None:
        await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())

    one = await compare({"get_comprehensive_status": lambda: timed(status), "a scrape, 1 pool": lambda: timed(scrape)})
    await tell(9, 200)
    ten = await compare({"a scrape, 10 pools with 200 fingerprints each": lambda: timed(scrape)})
    size = len(urllib.request.urlopen(url).read().splitlines())  # noqa: ASYNC210
    report(
        "Looking at a pool",
        "ms",
        {**one, **ten},
        ["limits: status 10 ms, scrape of ten pools 20 ms", f"the scrape of ten pools has {size:,} lines"],
    )
    server.shutdown()
    thread.join()
    metrics: Any = cluster.find_metrics()
    for number in range(9):
        await metrics.forget.remote(f"told-{number}")


if __name__ == "__main__":
    uvloop.run(main())
