"""Reads that share a write to the server: each must fare as if it had been sent alone. On a worker's engine, without
Ray."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from waiting import eventually, needs, one_round

from raypg import messages
from raypg.config import from_kwargs
from raypg.core.patterns import FoldGain
from raypg.embedded import EmbeddedServer
from raypg.errors import QueryTimeoutError
from raypg.portable import unpack_error
from raypg.server import preparing
from raypg.server.connect import Connector
from raypg.server.engine import Engine
from raypg.server.replies import BatchState

COUNT = "select count(*) from generate_series(1, $1::bigint) counted"
LONG = 10**11
"""As a parameter of ``COUNT``: longer than any test."""


class Bench:
    """An engine with connections to a real server, and one client."""

    def __init__(self, engine: Engine, direct: asyncpg.Connection, name: str) -> None:
        self.engine = engine
        self.direct = direct
        self.name = name
        self.client = engine.client("client", "job")
        self._numbers = iter(range(1, 1000))

    def submit(self, *statements: tuple[Any, ...], timeout: float | None = None) -> BatchState:
        """Put statements (SQL, parameter, …) into one message."""
        runs: list[messages.Run] = [
            (messages.FETCH, sql, [tuple(arguments)], timeout, None, None) for sql, *arguments in statements
        ]
        return self.engine.submit(self.client, next(self._numbers), runs)

    async def outcomes(self, batch: BatchState) -> list[Any]:
        """Rows or error of each, when all are done."""
        found: dict[int, Any] = {}
        await eventually(lambda: batch.open == 0, 30)
        for part in batch.take():
            for position, (payload, _, error) in messages.finished_of(part):
                found[position] = payload if error is None else unpack_error(error)
        self.client.batches.pop(batch.number, None)  # told
        return [found[position] for position in sorted(found)]

    async def train(self, *statements: tuple[Any, ...]) -> None:
        """Run statements until every connection has them prepared and they count as quick."""
        for sql, *arguments in statements:

            def known(sql: str = sql) -> bool:
                ready = [c for c in self.engine.connections if c.prepared(sql) is not None]
                return len(ready) == self.engine.connections.budget and self.engine.pace.is_quick(sql)

            while not known():
                await self.outcomes(self.submit(*[(sql, *arguments)] * self.engine.connections.budget))

    async def running(self, like: str) -> list[int]:
        """Backends that run such a statement."""
        rows = await self.direct.fetch(
            "select pid from pg_stat_activity where application_name = $1 and state = 'active' and query like $2",
            self.name,
            f"%{like}%",
        )
        return [row["pid"] for row in rows]


@pytest.fixture(params=["pg15", "pg18"])
async def bench(request: pytest.FixtureRequest, rng: random.Random) -> AsyncIterator[Bench]:
    """Two connections."""
    server: EmbeddedServer = request.getfixturevalue(request.param)
    config = from_kwargs(name="together", **server.parameters, max_connections=2)
    name = f"together-{rng.getrandbits(32):08x}"
    engine = Engine(config, Connector(config, name))
    engine.connections.grant(2, math.inf)
    direct = await asyncpg.connect(**server.parameters)
    try:
        await engine.connections.warm_up(2)
        yield Bench(engine, direct, name)
    finally:
        await engine.close("the test is over")
        await direct.close()


async def test_every_caller_gets_its_own_answer(bench: Bench, rng: random.Random) -> None:
    texts = ["select $1::int + 1", "select repeat('x', $1::int)", "select g from generate_series(1, $1::int) g"]
    await bench.train(*[(text, 1) for text in texts])
    bench.engine.pace.gain = FoldGain(0)  # remembers nothing: what it takes here and now decides nothing

    async def attempt() -> None:
        asked = [(rng.choice(texts), rng.randrange(2000)) for _ in range(1000)]
        before = bench.engine.figures.together
        outcomes = await bench.outcomes(bench.submit(*asked))
        for (text, number), rows in zip(asked, outcomes, strict=True):
            if text == texts[0]:
                assert rows == [(number + 1,)]
            elif text == texts[1]:
                assert rows == [("x" * number,)]
            else:
                assert rows == [(g,) for g in range(1, number + 1)]
        together = bench.engine.figures.together - before
        needs(together > 500, f"{together} of 1000 together")  # fewer when they seem to be slow

    await one_round(attempt)


async def test_an_error_is_that_of_its_own_statement(bench: Bench) -> None:
    divide = "select 10 / $1::int"
    await bench.train((divide, 5))
    outcomes = await bench.outcomes(bench.submit(*[(divide, (n % 4) - 1) for n in range(200)]))
    assert bench.engine.figures.together
    for n, outcome in enumerate(outcomes):
        divisor = (n % 4) - 1
        if divisor:
            assert outcome == [(10 // divisor,)]
        else:
            assert isinstance(outcome, asyncpg.DivisionByZeroError)


async def test_a_value_of_the_wrong_type_fails_alone(bench: Bench) -> None:
    text = "select $1::int"
    await bench.train((text, 1))
    outcomes = await bench.outcomes(bench.submit(*[(text, "no number" if n == 50 else n) for n in range(100)]))
    assert isinstance(outcomes.pop(50), asyncpg.DataError)
    assert [rows[0][0] for rows in outcomes] == [n for n in range(100) if n != 50]


async def test_each_has_a_transaction_of_its_own(bench: Bench) -> None:
    text = "select now(), $1::int"
    await bench.train((text, 1))
    outcomes = await bench.outcomes(bench.submit(*[(text, n) for n in range(400)]))
    assert bench.engine.figures.together
    # On one connection the clock moves on from one to the next, as it does only with a new transaction.
    assert len({rows[0][0] for rows in outcomes}) > 200


async def test_nobody_waits_behind_a_slow_one(bench: Bench) -> None:
    await bench.train((COUNT, 1))
    slow = bench.submit((COUNT, LONG), *[(COUNT, n) for n in range(100)])
    await eventually(lambda: slow.open == 1)
    assert bench.engine.figures.together > 1
    bench.engine.cancel(bench.client, slow.number, 0)
    outcomes = await bench.outcomes(slow)
    assert isinstance(outcomes[0], TimeoutError)
    assert outcomes[1:] == [[(n,)] for n in range(100)]
    await eventually(lambda: _nothing(bench))


async def _nothing(bench: Bench) -> bool:
    return not await bench.running("counted")


async def test_a_timeout_hits_only_its_own_statement(bench: Bench) -> None:
    await bench.train((COUNT, 1))
    patient = bench.submit(*[(COUNT, n) for n in range(50)])
    hasty = bench.submit((COUNT, LONG), timeout=3.0)
    others = bench.submit(*[(COUNT, n) for n in range(50)])
    assert isinstance((await bench.outcomes(hasty))[0], QueryTimeoutError)
    assert await bench.outcomes(patient) == await bench.outcomes(others) == [[(n,)] for n in range(50)]
    await eventually(lambda: _nothing(bench))


async def test_who_leaves_takes_nobody_along(bench: Bench, rng: random.Random) -> None:
    await bench.train((COUNT, 1))
    batch = bench.submit(*[(COUNT, n) for n in range(500)])
    left = rng.sample(range(500), 100)
    await eventually(lambda: batch.open < 500)
    for position in left:
        bench.engine.cancel(bench.client, batch.number, position)
    outcomes = await bench.outcomes(batch)
    for n, outcome in enumerate(outcomes):
        assert outcome == [(n,)] or (n in left and isinstance(outcome, TimeoutError | asyncpg.QueryCanceledError))
    assert await bench.outcomes(bench.submit((COUNT, 7))) == [[(7,)]]


async def test_when_all_have_left_the_server_stops(bench: Bench) -> None:
    await bench.train((COUNT, 1))
    batch = bench.submit(*[(COUNT, LONG)] * 20)
    await eventually(lambda: bench.running("counted"))
    for position in range(20):
        bench.engine.cancel(bench.client, batch.number, position)
    outcomes = await bench.outcomes(batch)
    assert all(isinstance(outcome, TimeoutError | asyncpg.QueryCanceledError) for outcome in outcomes)
    await eventually(lambda: _nothing(bench))
    assert await bench.outcomes(bench.submit((COUNT, 3), (COUNT, 4))) == [[(3,)], [(4,)]]


async def test_a_terminated_backend_is_not_noticed(bench: Bench) -> None:
    """They only read: all are asked once more, on another connection."""
    await bench.train((COUNT, 1))

    async def met() -> bool:  # a backend may have become idle before it is ended
        batch = bench.submit(*[(COUNT, 200_000 + n) for n in range(100)])
        pids: list[int] = []
        while batch.open and not pids:
            pids = await bench.running("counted")
        await bench.direct.fetchval("select pg_terminate_backend($1, 5000)", pids[0] if pids else None)
        assert await bench.outcomes(batch) == [[(200_000 + n,)] for n in range(100)]
        return bench.engine.figures.retries > 0

    await eventually(met, 60)


async def test_who_waited_behind_a_lost_read_has_a_try_left(bench: Bench) -> None:
    """Only the one that ran can have been the cause: its neighbours may lose another connection yet."""
    await bench.train((COUNT, 1))
    batch = bench.submit(*[(COUNT, 20_000 + n) for n in range(40)])
    await eventually(lambda: batch.open < 40)
    before = bench.engine.figures.retries
    pids = {c.pid for c in bench.engine.connections}
    await bench.direct.execute("select pg_terminate_backend(pid) from unnest($1::int[]) pid", list(pids))
    assert await bench.outcomes(batch) == [[(20_000 + n,)] for n in range(40)]
    assert bench.engine.figures.retries - before <= len(pids)


async def test_a_changed_table_is_seen_by_all(bench: Bench) -> None:
    direct = bench.direct
    table = bench.name.replace("-", "_")
    await direct.execute(f"create table {table} (a int)")
    try:
        await direct.execute(f"insert into {table} values (1)")
        text = f"select * from {table}"
        await bench.train((text,))
        assert await bench.outcomes(bench.submit(*[(text,)] * 50)) == [[(1,)]] * 50
        await direct.execute(f"alter table {table} add b text default 'new'")
        assert await bench.outcomes(bench.submit(*[(text,)] * 50)) == [[(1, "new")]] * 50
    finally:
        await direct.execute(f"drop table {table}")


async def test_statements_that_the_user_dropped_are_prepared_again(bench: Bench) -> None:
    text = "select $1::int"
    await bench.train((text, 1))
    dropped = bench.submit(*[("do $$ begin execute 'deallocate all'; end $$",)] * 2)
    await bench.outcomes(dropped)
    assert await bench.outcomes(bench.submit(*[(text, n) for n in range(50)])) == [[(n,)] for n in range(50)]


async def test_what_may_write_goes_alone(bench: Bench) -> None:
    direct = bench.direct
    table = bench.name.replace("-", "_")
    await direct.execute(f"create table {table} (a int); create sequence {table}_numbers")
    try:
        insert = f"insert into {table} values ($1)"
        counting = f"select nextval('{table}_numbers'), $1::int"
        before = bench.engine.figures.together
        await bench.outcomes(bench.submit(*[(insert, n) for n in range(50)], *[(counting, n) for n in range(50)]))
        await bench.outcomes(bench.submit(*[(insert, n) for n in range(50)], *[(counting, n) for n in range(50)]))
        assert bench.engine.figures.together == before
        assert await direct.fetchval(f"select count(*) from {table}") == 100
        assert await direct.fetchval(f"select last_value from {table}_numbers") == 100
    finally:
        await direct.execute(f"drop table {table}; drop sequence {table}_numbers")


async def test_many_connections_lost_and_won(bench: Bench, rng: random.Random) -> None:
    """Backends are ended at random under a steady load of reads: every answer is right or says what happened."""
    await bench.train((COUNT, 1))
    stop = asyncio.Event()

    async def reaper() -> None:
        while not stop.is_set():
            for pid in await bench.running("counted"):
                await bench.direct.execute("select pg_terminate_backend($1)", pid)
            await asyncio.sleep(rng.uniform(0, 0.02))

    reaping = asyncio.create_task(reaper())
    failed = 0
    for _ in range(20):
        asked = [(COUNT, rng.randrange(1, 5000)) for _ in range(100)]
        for (_, number), outcome in zip(asked, await bench.outcomes(bench.submit(*asked)), strict=True):
            failed += isinstance(outcome, Exception)
            assert isinstance(outcome, ConnectionError) or outcome == [(number,)]
    stop.set()
    await reaping
    assert bench.engine.connections.slots <= 2
    print(f"{failed} of 2000 failed")


async def test_what_was_found_to_gain_nothing_together_is_sent_alone(bench: Bench) -> None:
    """What it takes is the machine's affair, and said here; what follows from it is ours."""
    heavy, light = "select count(*) from generate_series(1, 2000 + $1::int) heavy", "select $1::int + 1 as light"
    await bench.train((heavy, 1), (light, 1))
    for _ in range(100):
        for sql, alone, together in ((heavy, 0.0041, 0.0040), (light, 0.0040, 0.0002)):
            bench.engine.pace.gain.note(sql, alone, together=False)
            bench.engine.pace.gain.note(sql, together, together=True)

    async def sent_together(sql: str) -> tuple[int, list[Any]]:
        before = bench.engine.figures.together
        rows = await bench.outcomes(bench.submit(*[(sql, number) for number in range(40)]))
        return bench.engine.figures.together - before, rows

    many, rows = await sent_together(light)
    assert rows == [[(number + 1,)] for number in range(40)]
    few, rows = await sent_together(heavy)
    assert rows == [[(2_000 + number,)] for number in range(40)]
    assert few < 15 < many  # it is tried again now and then


async def test_a_new_connection_has_prepared_what_comes_most_often(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "PREPARED_WITHIN", 10.0)
    table = f"public.t{bench.name[9:]}"
    await bench.direct.execute(f"create table {table} as select 5 as n")
    often, rarely = f"select n + $1::int from {table}", "select $1::int + 6"
    await bench.outcomes(bench.submit(*[(often, number) for number in range(50)], (rarely, 1)))
    for _ in range(50):
        bench.engine.pace.frequent.note("select n from nowhere")  # what cannot be prepared harms nobody
    connections = bench.engine.connections
    connections.grant(0, math.inf)
    await eventually(lambda: connections.total == 0)
    connections.grant(2, math.inf)
    await connections.warm_up(2)
    fresh = list(connections)
    assert len(fresh) == 2
    assert all(connection.number > 2 for connection in fresh)
    assert all(connection.prepared(often) is not None and connection.prepared(rarely) is None for connection in fresh)
    assert await bench.outcomes(bench.submit((often, 1))) == [[(6,)]]
    # Nobody holds a lock on the table only because it is known.
    await bench.direct.execute(f"set lock_timeout = '5s'; drop table {table}")
