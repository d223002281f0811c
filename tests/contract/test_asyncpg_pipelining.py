"""What `raypg.server.pipelining` takes for granted of asyncpg, and of the transports of event loops."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
import uvloop
from proxy import Proxy
from waiting import eventually

from raypg import messages
from raypg.embedded import EmbeddedServer
from raypg.server import witness
from raypg.server.connection import ServerConnection
from raypg.server.pipelining import Pipeline

pytestmark = pytest.mark.contract

TEXTS = {
    "select $1::int, null::text": lambda n: [(n, None)],
    "select repeat('x', $1::int)": lambda n: [("x" * n,)],
    "select g, g::text from generate_series(1, $1::int) g": lambda n: [(g, str(g)) for g in range(1, n + 1)],
}
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]


def on(loop: Callable[[], asyncio.AbstractEventLoop], work: Any) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work)


async def answers(connection: asyncpg.Connection, statements: list[tuple[str, int]], pipeline: Pipeline) -> list[Any]:
    """Rows or error of each, in order of the answers, which must be that of the statements."""
    found: list[Any] = []

    def told(index: int, result: Any, error: BaseException | None) -> None:
        assert index == len(found)
        found.append([tuple(row) for row in result[0]] if error is None else error)

    prepared = [(pipeline.prepared(text), (number,), 0) for text, number in statements]
    assert None not in [state for state, *_ in prepared]
    await pipeline.run(prepared, told)
    return found


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("server", ["pg15", "pg18"])
def test_answers_are_cut_at_the_right_places(
    request: pytest.FixtureRequest, server: str, loop: Callable[[], asyncio.AbstractEventLoop], rng: random.Random
) -> None:
    """Sizes from nothing to several buffers of the transport, so that messages and headers are cut anywhere."""
    running: EmbeddedServer = request.getfixturevalue(server)

    async def work() -> None:
        connection = await asyncpg.connect(**running.parameters)
        pipeline = Pipeline(connection)
        for text in TEXTS:
            await connection.fetch(text, 1)
        for _ in range(150):
            asked = [
                (rng.choice(list(TEXTS)), int(10 ** rng.uniform(0, rng.choice([1, 4, 5.5]))))
                for _ in range(rng.randrange(1, 9))
            ]
            asked = [(text, number if "series" not in text else number % 20_000) for text, number in asked]
            assert await answers(connection, asked, pipeline) == [TEXTS[text](number) for text, number in asked]
            # In between, the connection is asyncpg's as ever.
            assert await connection.fetchval("select $1::int", 3) == 3
        await connection.close()

    on(loop, work())


@pytest.mark.parametrize("loop", LOOPS)
def test_notices_and_settings_reach_the_connection(
    pg: EmbeddedServer, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def work() -> None:
        connection = await asyncpg.connect(**pg.parameters)
        await connection.execute("""
            create function pg_temp.speak(n int) returns int language plpgsql as
            $$ begin raise notice 'number %', n; perform set_config('timezone', 'Asia/Tokyo', false); return n; end $$
        """)
        heard: list[str] = []
        connection.add_log_listener(lambda _, message: heard.append(message.message))
        text = "select pg_temp.speak($1)"
        await connection.fetch(text, 0)
        await connection.execute("set timezone = 'UTC'")
        pipeline = Pipeline(connection)
        assert await answers(connection, [(text, n) for n in (1, 2, 3)], pipeline) == [[(n,)] for n in (1, 2, 3)]
        await connection.fetchval("select 1")
        assert heard == [f"number {n}" for n in range(4)]
        assert connection.get_settings().TimeZone == "Asia/Tokyo"
        await connection.close()

    on(loop, work())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_that_dies_in_a_run(
    pg: EmbeddedServer, loop: Callable[[], asyncio.AbstractEventLoop], rng: random.Random
) -> None:
    """All that have no answer learn of it; the first of them has the server's last words."""

    async def work() -> None:
        connection = await asyncpg.connect(**pg.parameters)
        text = "select case when $1::int = 3 then pg_terminate_backend(pg_backend_pid())::text else $1::text end"
        await connection.fetch(text, 0)
        found = await answers(connection, [(text, n) for n in range(6)], Pipeline(connection))
        assert found[:3] == [[(str(n),)] for n in range(3)]
        assert connection.is_closed()
        assert all(isinstance(error, asyncpg.ConnectionDoesNotExistError) for error in found[3:])
        assert isinstance(found[3].__cause__, asyncpg.AdminShutdownError)

    on(loop, work())


@pytest.mark.parametrize("loop", LOOPS)
def test_who_is_cancelled_in_a_run_closes_the_connection(
    pg: EmbeddedServer, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Answers on their way could not be told apart by who comes next."""

    async def work() -> None:
        connection = await asyncpg.connect(**pg.parameters)
        text = "select pg_sleep($1)"
        await connection.fetch(text, 0)
        run = asyncio.create_task(answers(connection, [(text, 60)] * 2, Pipeline(connection)))
        await asyncio.wait((run,), timeout=0.1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert connection.is_closed()

    on(loop, work())


@pytest.mark.parametrize("loop", LOOPS)
def test_last_words_that_nobody_waits_for(pg: EmbeddedServer, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """asyncpg drops them, and the socket says so later: who asks in between must not take it for a living one."""

    async def work() -> None:
        async with Proxy(pg.port) as proxy:
            proxy.late = True
            direct = await asyncpg.connect(**pg.parameters)
            raw = await asyncpg.connect(**{**pg.parameters, "host": "127.0.0.1", "port": proxy.port})
            connection = ServerConnection(raw, 1, 0.0, None)
            await direct.execute("select pg_terminate_backend($1)", connection.pid)
            await eventually(lambda: connection._pipeline.may_have_ended)
            assert not raw.is_closed()
            assert not await connection.is_alive()
            await direct.close()

    on(loop, work())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_statement_with_a_witness_leaves_the_pipeline_in_its_place(
    pg: EmbeddedServer, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Both stand between the socket and asyncpg; a run whose answers went to asyncpg would never end."""

    async def work() -> None:
        connection = ServerConnection(await asyncpg.connect(**pg.parameters), 1, 0.0, None)
        text = "select $1::int, null::text"
        await connection.run(messages.FETCH, "create temp table left_by_witness (id int)", ())
        for number in range(3):
            insert = "insert into left_by_witness values ($1) returning id"
            assert witness.is_needed(messages.FETCH, insert, (number,), simple=False)
            assert (await connection.run(messages.FETCH, insert, (number,)))[0] == [(number,)]
            await connection.run(messages.FETCH, text, (number,))
            asked = [(text, number), (text, -number)]
            found = await asyncio.wait_for(answers(connection.raw, asked, connection._pipeline), 10)
            assert found == [[(number, None)], [(-number, None)]]
        await connection.close()

    on(loop, work())
