"""The standbys that other tests rely on: they stream, can be held up, and become primaries."""

from __future__ import annotations

import asyncpg
import pytest
from standby import ask, caught_up, delay, pause, promote, resume, standby_of
from waiting import eventually

from raypg.embedded import EmbeddedServer


async def test_a_standby_streams_and_can_be_held_up_and_promoted(
    pg18: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    count = f"select count(*) from {schema}.t"
    with standby_of(pg18) as standby:
        assert await ask(standby, "select pg_is_in_recovery()")
        await direct.execute(f"create table {schema}.t as select 1 as a")
        await caught_up(pg18, standby)
        assert await ask(standby, count) == 1
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await ask(standby, f"insert into {schema}.t values (2)")
        await pause(standby)
        await direct.execute(f"insert into {schema}.t values (2)")
        written = await ask(pg18, "select pg_current_wal_lsn()::text")
        await eventually(lambda: ask(standby, "select pg_last_wal_receive_lsn() >= $1::text::pg_lsn", written))
        assert await ask(standby, count) == 1
        await resume(standby)
        await caught_up(pg18, standby)
        assert await ask(standby, count) == 2
        await delay(standby, 60_000)
        await direct.execute(f"insert into {schema}.t values (3)")
        assert await ask(standby, count) == 2
        await delay(standby, 0)
        await caught_up(pg18, standby)
        await promote(standby)
        await ask(standby, f"insert into {schema}.t values (4)")
        assert await ask(standby, count) == 4
        assert await ask(pg18, count) == 3
