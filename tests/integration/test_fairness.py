"""A job with a hundred times the load does not make another wait: by order of service, on an engine without Ray.

Times are for benchmarks/bench_fairness.py.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from waiting import eventually

from raypg import messages
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.server.connect import Connector
from raypg.server.engine import Engine
from raypg.server.replies import BatchState

LIGHT = 40
HEAVY = 100 * LIGHT


@pytest.fixture(params=[1, 3])
async def engine(request: pytest.FixtureRequest, pg: EmbeddedServer) -> AsyncIterator[Engine]:
    """With one connection, and with three."""
    config = from_kwargs(name="fair", environ={}, **pg.parameters, max_connections=request.param)
    made = Engine(config, Connector(config, "raypg:fairness:0:0"))
    made.connections.grant(request.param, math.inf)
    try:
        await made.connections.warm_up(request.param)
        yield made
    finally:
        await made.close("the test is over")


@pytest.fixture
def served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that `engine` takes out of its queue, in that order. When it is done is up to the server's processes."""
    order: list[Any] = []
    pop = engine.queue.pop

    def watched(now: float, only: Callable[[Any], bool] | None = None) -> Any:
        work = pop(now, only)
        if work is not None:
            order.append(work)
        return work

    monkeypatch.setattr(engine.queue, "pop", watched)
    return order


def submit(engine: Engine, job: str, number: int, sql: str, rows: list[tuple[Any, ...]]) -> BatchState:
    return engine.submit(
        engine.client(f"client of {job}", job), number, [(messages.FETCH, sql, rows, None, None, None)]
    )


@pytest.mark.parametrize("sql", ["select $1::int", "select $1::int, txid_current()"], ids=["reads", "writes"])
async def test_few_statements_of_a_heavy_job_are_served_before_one_of_a_light_job(
    engine: Engine, served: list[Any], sql: str
) -> None:
    heavy: list[BatchState] = []

    async def keep_busy() -> None:
        """The heavy job has something waiting all the time."""
        for number in itertools.count():
            heavy.append(submit(engine, "heavy", number, sql, [(n,) for n in range(HEAVY)]))
            await eventually(lambda: heavy[-1].open < HEAVY // 2, 60)

    busy = asyncio.create_task(keep_busy())
    await eventually(lambda: heavy and heavy[0].open < HEAVY)
    ahead = []
    for number in range(LIGHT):
        before = len(served)
        light = submit(engine, "light", number, sql, [(number,)])
        (statement,) = light.statements.values()
        while light.open:
            await light.done_or_stalled()
        light.client.batches.pop(number)
        ahead.append(served.index(statement) - before)
    assert any(batch.open for batch in heavy)
    busy.cancel()
    # A turn of the heavy job, when the light one has used up its own.
    assert max(ahead) <= engine.queue.quantum
    assert sum(ahead) <= 2 * LIGHT
    await eventually(lambda: not any(batch.open for batch in heavy), 60)
    heavy[0].client.batches.clear()  # else the engine would wait for somebody to ask for their outcomes


async def test_few_leases_of_a_heavy_job_are_granted_before_one_of_a_light_job(
    engine: Engine, served: list[Any]
) -> None:
    async def hold(job: str, number: int) -> None:
        lease = await engine.acquisitions.lease((job, number), job, {"client": job}, 60.0, 60.0, "BEGIN")
        await engine.release(lease.token, "ROLLBACK")

    count = 300
    heavy: list[asyncio.Task[None]] = []

    def waiting() -> int:
        return sum(not task.done() for task in heavy)

    async def keep_busy() -> None:
        """Many of the heavy job wait all the time."""
        while True:
            heavy.extend(asyncio.create_task(hold("heavy", len(heavy) + number)) for number in range(count))
            await eventually(lambda: waiting() < count // 2, 60)

    busy = asyncio.create_task(keep_busy())
    await eventually(lambda: heavy and heavy[0].done())
    ahead = []
    for number in range(count // 20):
        before = len(served)
        await hold("light", number)
        ahead.append([request.name for request in served[before:]].index("light"))
    assert waiting()
    busy.cancel()
    assert max(ahead) <= engine.queue.quantum
    await asyncio.gather(*heavy)
