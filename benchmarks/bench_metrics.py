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

from raypg import WorkflowConnectionPool, cluster, naming
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


def stop_recording(worker: Any) -> None:
    """Runs in a worker: nothing is counted or told from now on."""
    from raypg.server import figures
    from raypg.server.outcomes import outcome_of

    worker._metrics.close()

    def nothing(*_: Any) -> None:
        pass

    for name in ("ran", "ran_together", "waited", "given_back"):
        setattr(figures.Figures, name, nothing)
    figures.Figures.fetched = lambda self, mode, records, status: outcome_of(mode, records, status)  # type: ignore[method-assign]


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
    without = WorkflowConnectionPool(name="unmeasured", max_connections=here.connections + 1, **here.server.parameters)
    await without.process({"operation": "initialize"})
    worker = ray.get_actor(naming.worker_actor("unmeasured", 0), namespace=naming.NAMESPACE)
    await worker.__ray_call__.remote(stop_recording)

    def reads(pool: WorkflowConnectionPool) -> Any:
        async def read(number: int) -> None:
            await pool.fetchrow(OTHER if number % 4 == 0 else QUERY, number % 10_000 + 1)

        return lambda: rate(read, 20_000, CLIENTS)

    both = await compare({"with metrics": reads(here.pool), "without": reads(without)}, rounds=15)
    share = (1 - ratio(both, "with metrics", "without")) * 100
    report(
        "What metrics cost 1,000 coroutines that read",
        "reads/s",
        both,
        [f"with ÷ without: {1 - share / 100:.3f}, a cost of {share:.1f} % (limit 4 %)"],
    )
    await without.close()


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
